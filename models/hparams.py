"""A typed reader over `config.json`, which knows how transformers 4 and 5 spell things."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from models.errors import CheckpointError, UnsupportedError

RopeType = Literal["default", "linear", "llama3", "yarn"]
_ROPE_TYPES: tuple[RopeType, ...] = ("default", "linear", "llama3", "yarn")

_MAX_FLOAT = 3.4e38
"""GGUF keeps numbers in 32 bits."""

_MAX_HEAD_DIM = 1 << 16
"""Far above any model; as much is allocated for rope factors before llama.cpp looks at the shapes."""

# Fields that change what a model computes, with the values that leave it as it is. llama.cpp's graphs of the
# families here know none of them, so any other value would make a file that answers wrongly.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attn_logit_softcapping": (None, 0, 0.0),
    "attention_multiplier": (None, 1, 1.0),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "final_logit_softcapping": (None, 0, 0.0),
    "hidden_act": (None, "silu", "swish"),
    "is_causal": (None, True),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "partial_rotary_factor": (None, 1, 1.0),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1, 1.0),
    "use_qk_norm": (None, False),
}


@dataclass(frozen=True)
class RopeParameters:
    """Rotary position embedding: base frequency, how it is scaled, and the fields of that scaling."""

    theta: float
    type: RopeType
    fields: Mapping[str, Any]

    def number(self, name: str, default: float | None = None) -> float:
        """A field of the scaling. Raises CheckpointError if it is missing without a default, or no number."""
        value = self.fields.get(name)
        return _number(f"rope_parameters.{name}", default if value is None else value)


class Hparams:
    """The fields of a config that describe the text model.

    Getters raise CheckpointError, naming the field, where a value is missing or has the wrong type.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, object]) -> None:
        text = config.get("text_config")
        self._fields: dict[str, Any] = {**config, **text} if isinstance(text, Mapping) else dict(config)
        self._defaults = defaults

    def get(self, name: str) -> Any:
        value = self._fields.get(name)
        return self._defaults.get(name) if value is None else value

    def integer(self, name: str) -> int:
        """A positive integer below 2^31."""
        value = self.get(name)
        if value is None:
            raise CheckpointError(f"config.json has no {name!r}", field=name)
        # bool is an int for Python; 4096.0 is written by some tools
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
            raise CheckpointError(f"config.json: {name!r} is {_shown(value)}, not an integer", field=name)
        if not 0 < value < 2**31:
            raise CheckpointError(f"config.json: {name!r} is {_shown(value)}, out of range", field=name)
        return int(value)

    def number(self, name: str) -> float:
        return _number(name, self.get(name))

    def flag(self, name: str) -> bool:
        return self.get(name) is True

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

    def _divided_head_dim(self) -> int:
        hidden = self.integer("hidden_size")
        if hidden % self.n_heads:
            raise CheckpointError(
                f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {self.n_heads}"
            )
        return hidden // self.n_heads

    @property
    def rope(self) -> RopeParameters:
        """`rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (transformers 4).

        Raises UnsupportedError for a scaling that is not known, by name.
        """
        fields = self.get("rope_parameters") or self.get("rope_scaling") or {}
        if not isinstance(fields, Mapping):
            raise CheckpointError(f"config.json: the rope parameters are {_shown(fields)}, not an object")
        name = str(fields.get("rope_type") or fields.get("type") or "default").lower()
        if fields.get("partial_rotary_factor") not in (None, 1):
            raise UnsupportedError(
                f"config.json: 'partial_rotary_factor' is {_shown(fields['partial_rotary_factor'])}, "
                "which this architecture does not compute",
                hint="A file made from it would answer wrongly.",
                field="partial_rotary_factor",
            )
        for known in _ROPE_TYPES:
            if name == known:
                theta = fields.get("rope_theta")
                merged = dict(fields)
                outer = self.get("original_max_position_embeddings")
                if outer is not None:
                    merged.setdefault("original_max_position_embeddings", outer)
                theta = _number("rope_theta", self.get("rope_theta") if theta is None else theta)
                return RopeParameters(theta, known, merged)
        raise UnsupportedError(
            f"rope scaling {name[:80]!r} is not supported",
            hint=f"Known scalings: {', '.join(_ROPE_TYPES)}.",
            rope_type=name,
        )

    def refuse_unknown_computation(self) -> None:
        """Raise UnsupportedError for a field whose value changes the computation and that nothing here reads."""
        if self.get("quantization_config"):
            method = self.get("quantization_config")
            name = method.get("quant_method", "?") if isinstance(method, Mapping) else "?"
            raise UnsupportedError(
                f"the checkpoint is quantized ({str(name)[:40]!r})",
                hint="Convert the original bf16, f16 or f32 checkpoint.",
            )
        if self.flag("use_sliding_window"):
            raise UnsupportedError("config.json: 'use_sliding_window' is true, which llama.cpp does not compute here")
        layer_types = self.get("layer_types") or []
        if isinstance(layer_types, list) and any(kind != "full_attention" for kind in layer_types):
            raise UnsupportedError("config.json: 'layer_types' has other layers than 'full_attention'")
        for name, neutral in _NEUTRAL.items():
            value = self.get(name)
            if not any(value == known and type(value) is type(known) for known in neutral):
                raise UnsupportedError(
                    f"config.json: {name!r} is {_shown(value)}, which this architecture does not compute",
                    hint="A file made from it would answer wrongly.",
                    field=name,
                )


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise CheckpointError(f"config.json: {name!r} is {_shown(value)}, not a number", field=name)
    if not abs(value) <= _MAX_FLOAT:
        raise CheckpointError(f"config.json: {name!r} is {_shown(value)}, out of range", field=name)
    return float(value)


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:80]
