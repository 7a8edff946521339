"""Rotary position embeddings of a config: transformers 4's `rope_theta` and `rope_scaling`, 5's `rope_parameters`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from models.errors import CheckpointError, UnsupportedError

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]
_TYPES: dict[str, RopeType] = {
    "default": "default",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "deepseek_yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",
    "proportional": "proportional",
    "mrope": "default",  # sections apart: all of one position for text
}

# What transformers and llama.cpp read of each; any other field could change the computation.
_FIELDS = frozenset(
    """
    rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings mrope_section
    mrope_interleaved attention_factor attn_factor extrapolation_factor beta_fast beta_slow mscale mscale_all_dim
    truncate low_freq_factor high_freq_factor short_factor long_factor short_mscale long_mscale alpha
    llama_4_scaling_beta max_position_embeddings
    """.split()  # noqa: SIM905
)

_MAX_FLOAT = 3.4e38
"""GGUF keeps numbers in 32 bits."""


class Fields(Protocol):
    """What is read of a config: see Hparams."""

    def get(self, name: str) -> Any: ...


@dataclass(frozen=True)
class RopeParameters:
    """Base frequency, the part of a head that is rotated, how it is scaled, and the fields of that scaling."""

    theta: float
    type: RopeType
    partial: float
    fields: Mapping[str, Any]

    def number(self, name: str, default: float | None = None) -> float:
        """A field of the scaling. Raises CheckpointError if it is missing without a default, or no number."""
        value = self.fields.get(name)
        return number_of(f"rope_parameters.{name}", default if value is None else value)

    def has(self, name: str) -> bool:
        return self.fields.get(name) is not None


def read_rope(hparams: Fields, kind: str) -> RopeParameters:
    """The rope of one kind of attention. Raises CheckpointError, UnsupportedError for what is not known, by name."""
    # every field is asked for, since what nobody asks for is refused
    new, old = hparams.get("rope_parameters"), hparams.get("rope_scaling")
    theta, local_theta = hparams.get("rope_theta"), hparams.get("rope_local_theta")
    partial, trained = hparams.get("partial_rotary_factor"), hparams.get("original_max_position_embeddings")
    fields = new or old or {}
    if isinstance(fields, Mapping) and isinstance(fields.get("full_attention"), Mapping):  # one for each kind
        fields = fields.get(kind) or fields["full_attention"]
    elif kind == "sliding_attention" and local_theta is not None:
        fields, theta = {}, local_theta  # what is scaled is the global kind only (Gemma 3)
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"config.json: the rope parameters are {shown(fields)}, not an object")
    name = str(fields.get("rope_type") or fields.get("type") or "default").lower()
    if name not in _TYPES:
        raise UnsupportedError(
            f"rope scaling {name[:80]!r} is not supported",
            hint=f"Known scalings: {', '.join(_TYPES)}.",
            rope_type=name,
        )
    for field, value in fields.items():
        if field not in _FIELDS and value is not None:
            raise UnsupportedError(
                f"config.json: the rope parameter {str(field)[:80]!r} is {shown(value)}, which is not known",
                hint="A file made from it could answer wrongly.",
                field=field,
            )
    merged = dict(fields)
    if trained is not None:
        merged.setdefault("original_max_position_embeddings", trained)
    theta = theta if fields.get("rope_theta") is None else fields["rope_theta"]
    partial = partial if fields.get("partial_rotary_factor") is None else fields["partial_rotary_factor"]
    partial = 1.0 if partial is None else number_of("partial_rotary_factor", partial)
    if not 0 < partial <= 1:
        raise CheckpointError(f"config.json: 'partial_rotary_factor' is {shown(partial)}, out of range")
    return RopeParameters(number_of("rope_theta", theta), _TYPES[name], partial, merged)


def number_of(name: str, value: Any) -> float:
    """A number that GGUF can hold. Raises CheckpointError, naming the field."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise CheckpointError(f"config.json: {name!r} is {shown(value)}, not a number", field=name)
    if not abs(value) <= _MAX_FLOAT:
        raise CheckpointError(f"config.json: {name!r} is {shown(value)}, out of range", field=name)
    return float(value)


def shown(value: object) -> str:
    """A value of a config as a message quotes it."""
    return "missing" if value is None else repr(value)[:80]
