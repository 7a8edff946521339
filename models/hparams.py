"""A typed reader over `config.json`, which knows how transformers 4 and 5 spell things, and what nobody read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from models.config_fields import ALIASES, is_inert, is_neutral
from models.errors import CheckpointError, UnsupportedError
from models.rope import RopeParameters, number_of, read_rope, shown
from models.weights import Weights

_MAX_HEAD_DIM = 1 << 16
"""Far above any model; as much is allocated for rope factors before llama.cpp looks at the shapes."""

Requirement: TypeAlias = "tuple[object, ...] | Callable[[Hparams], tuple[object, ...]]"
"""The values of a field that a family computes; they may follow from other fields."""

# Configs of the other parts of a multimodal checkpoint, whose text part is converted.
_SUB_CONFIGS = ("text_config", "vision_config", "audio_config")


class Hparams:
    """The fields of a config that describe the text model, under the names of LlamaConfig and its kin.

    Getters raise CheckpointError, naming the field, where a value is missing or has the wrong type. Each remembers
    what was asked for: a field that changes the computation and that nobody read is refused (`refuse_unread`).
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        defaults: Mapping[str, object],
        aliases: Mapping[str, str] | None = None,
        tensors: Mapping[str, Weights] | None = None,
    ) -> None:
        text = config.get("text_config")
        self._fields: dict[str, Any] = {**config, **text} if isinstance(text, Mapping) else dict(config)
        self._config = config
        self._defaults = defaults
        self._aliases = aliases or {}
        self._read: set[str] = set()
        self.tensors: Mapping[str, Weights] = tensors or {}
        """What the checkpoint has, where that tells more than its config."""

    @property
    def is_multimodal(self) -> bool:
        """Whether the checkpoint has other parts than the text model."""
        return any(name in self._fields for name in _SUB_CONFIGS)

    def get(self, name: str) -> Any:
        """A field, in any of its spellings; its default if it is missing or null."""
        spellings = (self._aliases[name],) if name in self._aliases else (name, *ALIASES.get(name, ()))
        self._read.update(spellings)
        for spelling in spellings:
            if (value := self._fields.get(spelling)) is not None:
                return value
        return self._defaults.get(name)

    def has(self, name: str) -> bool:
        return self.get(name) is not None

    def integer(self, name: str) -> int:
        """A positive integer below 2^31."""
        value = self.natural(name)
        if value == 0:
            raise CheckpointError(f"config.json: {name!r} is 0, out of range", field=name)
        return value

    def natural(self, name: str) -> int:
        """An integer from 0 to 2^31."""
        value = self.get(name)
        if value is None:
            raise CheckpointError(f"config.json has no {name!r}", field=name)
        return _natural(name, value)

    def naturals(self, name: str) -> list[int]:
        """A list of integers from 0 to 2^31, such as one a block."""
        return [_natural(name, value) for value in self.items(name)]

    def number(self, name: str) -> float:
        return number_of(name, self.get(name))

    def numbers(self, name: str) -> list[float]:
        return [number_of(name, value) for value in self.items(name)]

    def flag(self, name: str) -> bool:
        return self.get(name) is True

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise CheckpointError(f"config.json: {name!r} is {shown(value)}, not a text", field=name)
        return value

    def items(self, name: str) -> list[Any]:
        """A list of at most as many items as a model has blocks, or a few."""
        value = self.get(name)
        if not isinstance(value, list) or len(value) > 1 << 16:
            raise CheckpointError(f"config.json: {name!r} is {shown(value)}, not a list", field=name)
        return value

    @property
    def ties_embeddings(self) -> bool:
        """Whether the embedding serves as the output matrix: the whole model's config says so, or the text part's."""
        outer = self._config.get("tie_word_embeddings")
        return self.flag("tie_word_embeddings") or outer is True

    @property
    def n_layers(self) -> int:
        return self.integer("num_hidden_layers")

    @property
    def n_heads(self) -> int:
        return self.integer("num_attention_heads")

    @property
    def n_heads_kv(self) -> int:
        return self.n_heads if self.get("num_key_value_heads") is None else self.integer("num_key_value_heads")

    @property
    def head_dim(self) -> int:
        """Rows of one head, given or hidden size by heads. Raises CheckpointError if that does not divide."""
        dim = self.integer("head_dim") if self.get("head_dim") is not None else self._divided_head_dim()
        if dim > _MAX_HEAD_DIM:
            raise CheckpointError(f"config.json: a head of {dim:,} rows is out of range", field="head_dim")
        return dim

    def _divides_evenly(self, head_dim: object) -> bool:
        """Whether the width of a head is what it is where nobody asks for it."""
        heads = self.get("num_attention_heads")
        return type(head_dim) is int and type(heads) is int and head_dim * heads == self.get("hidden_size")

    def _divided_head_dim(self) -> int:
        hidden = self.integer("hidden_size")
        if hidden % self.n_heads:
            raise CheckpointError(
                f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {self.n_heads}"
            )
        return hidden // self.n_heads

    @property
    def rotary_dim(self) -> int:
        """The rows of a head that are rotated: all of them, or the part that `rotary_part` is."""
        return int(self.head_dim * self.rotary_part)

    @property
    def rotary_part(self) -> float:
        """How much of a head is rotated in full attention, from 0 to 1; a family that does not ask computes 1."""
        self._read.add("rotary_part")
        return self.rope.partial

    @property
    def rope(self) -> RopeParameters:
        """Of full attention. Raises UnsupportedError for a scaling that is not known, by name."""
        return self.rope_of("full_attention")

    def rope_of(self, kind: str) -> RopeParameters:
        """The rotary embedding of one kind of attention, where a config tells them apart, else of all."""
        return read_rope(self, kind)

    def require(self, requirements: Mapping[str, Requirement], ignored: Iterable[str] = ()) -> None:
        """Raise UnsupportedError for a field with a value that the family does not compute."""
        for name, allowed in requirements.items():
            value = self.get(name)
            values = allowed(self) if callable(allowed) else allowed
            if name not in ignored and not any(value == known and type(value) is type(known) for known in values):
                raise _refused(name, value)

    def refuse_unread(self, ignored: Iterable[str] = ()) -> None:
        """Raise UnsupportedError for a field that may change the computation and that nobody has read."""
        for name, value in self._fields.items():
            if name in self._read or name in ignored or name in _SUB_CONFIGS or is_inert(name):
                continue
            if not is_neutral(name, value) and not (name == "head_dim" and self._divides_evenly(value)):
                raise _refused(name, value)
        partial = self.rope.partial
        if partial != 1 and "rotary_part" not in self._read and "partial_rotary_factor" not in ignored:
            raise _refused("partial_rotary_factor", partial)


def _refused(name: str, value: object) -> UnsupportedError:
    return UnsupportedError(
        f"config.json: {name[:80]!r} is {shown(value)}, which this architecture does not compute",
        hint="A file made from it could answer wrongly. If it changes nothing in this model: --ignore-field NAME.",
        field=name,
    )


def _natural(name: str, value: Any) -> int:
    # bool is an int for Python; 4096.0 is written by some tools
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
        raise CheckpointError(f"config.json: {name!r} is {shown(value)}, not an integer", field=name)
    if not 0 <= value < 2**31:
        raise CheckpointError(f"config.json: {name!r} is {shown(value)}, out of range", field=name)
    return int(value)
