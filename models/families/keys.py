"""Metadata keys of a model's shape: getters to build them from, and the keys that every family has.

Source: llama.cpp, conversion/base.py `set_gguf_parameters`; the names are those of gguf's `Keys`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from models.errors import CheckpointError, UnsupportedError
from models.families import Getter, Value
from models.hparams import Hparams

# gguf.ExpertGatingFuncType
_GATING = {"softmax": 1, "sigmoid": 2}


def integer(name: str) -> Getter:
    """A positive integer, if the config has it; a list of them, one a block, where a config has that."""
    return lambda hparams: _integers(hparams, name) if hparams.has(name) else None


def natural(name: str) -> Getter:
    """The same, 0 included."""
    return lambda hparams: hparams.natural(name) if hparams.has(name) else None


def number(name: str) -> Getter:
    """A number, if the config has it."""
    return lambda hparams: hparams.number(name) if hparams.has(name) else None


def flag(name: str) -> Getter:
    """A boolean, if the config has it."""
    return lambda hparams: hparams.flag(name) if hparams.has(name) else None


def fixed(value: Value) -> Getter:
    """What is the same for the whole family."""
    return lambda hparams: value


def absent(hparams: Hparams) -> None:
    """Leaves out a key that other families have."""


def head_dim(hparams: Hparams) -> int:
    """Rows of a head, also where the config gives only the hidden size and the number of heads."""
    return hparams.head_dim


def rotary_dim(hparams: Hparams) -> int:
    """Rows of a head that are rotated."""
    return hparams.rotary_dim


def layer_types(kind: str) -> Getter:
    """True for each block whose `layer_types` is `kind`."""
    return lambda hparams: [entry == kind for entry in hparams.items("layer_types")]


def sliding_pattern(period: int, *, always: bool = False) -> Getter:
    """True for each block that looks back a window only.

    Without `layer_types` that is every block but each `period`th, which llama.cpp knows: unless `always`, the key is
    written only where a config says otherwise.
    """

    def value(hparams: Hparams) -> list[bool] | None:
        usual = [(block + 1) % period != 0 for block in range(hparams.n_layers)]
        given = layer_types("sliding_attention")(hparams) if hparams.has("layer_types") else usual
        assert isinstance(given, list)
        return [bool(entry) for entry in given] if always or given != usual else None

    return value


def sliding_theta(hparams: Hparams) -> float:
    """The base frequency of blocks that look back a window only. Raises UnsupportedError if that is scaled."""
    rope = hparams.rope_of("sliding_attention")
    if rope.type != "default" or rope.partial != 1:
        raise UnsupportedError(
            "config.json: the rope of sliding attention is scaled or partial, which llama.cpp does not compute",
            rope_type=rope.type,
        )
    return rope.theta


def other_theta(usual: float) -> Getter:
    """The base frequency, where it is not the one that llama.cpp assumes and its converter leaves out."""
    return lambda hparams: None if hparams.rope.theta == usual else hparams.rope.theta


def every_nth(n: int, value: object, *, others: object) -> Callable[[Hparams], tuple[object, ...]]:
    """Requires a list with `value` for each nth block, or none."""
    return lambda hparams: (None, [value if (block + 1) % n == 0 else others for block in range(hparams.n_layers)])


def rope_number(name: str, types: tuple[str, ...] = ("yarn",)) -> Getter:
    """A field of the rope scaling, if it is of these types and has it."""

    def value(hparams: Hparams) -> float | None:
        rope = hparams.rope
        return rope.number(name) if rope.type in types and rope.has(name) else None

    return value


def _integers(hparams: Hparams, name: str) -> Value:
    return hparams.naturals(name) if isinstance(hparams.get(name), list) else hparams.integer(name)


def _given_head_dim(hparams: Hparams) -> int | None:
    return hparams.head_dim if hparams.has("head_dim") else None


def _scaling_type(hparams: Hparams) -> str | None:
    kind = hparams.rope.type
    return kind if kind in ("linear", "yarn", "longrope") else None


def trained_context(hparams: Hparams) -> int:
    """How many tokens a model was trained with before its rope was scaled. Raises CheckpointError below 2."""
    name = "original_max_position_embeddings"
    trained = hparams.rope.number(name, hparams.integer("max_position_embeddings"))
    if not 2 <= trained < 2**31:
        raise CheckpointError(f"config.json: {name!r} is {trained:g}, out of range", field=name)
    return int(trained)


def longrope_attention_factor(hparams: Hparams) -> float | None:
    """What transformers multiplies sine and cosine by: modeling_rope_utils.py `_compute_longrope_parameters`."""
    rope = hparams.rope
    if rope.type != "longrope":
        return None
    if rope.has("attention_factor"):
        return rope.number("attention_factor")
    trained = trained_context(hparams)
    scale = rope.number("factor") if rope.has("factor") else hparams.integer("max_position_embeddings") / trained
    return math.sqrt(1 + math.log(scale) / math.log(trained)) if scale > 1 else 1.0


def _trained_context(hparams: Hparams) -> int | None:
    rope = hparams.rope
    if rope.type == "yarn":
        return int(rope.number("original_max_position_embeddings"))
    return trained_context(hparams) if _is_stretched(hparams) else None


def _is_stretched(hparams: Hparams) -> bool:
    """Whether a longrope reaches beyond the trained context, which llama.cpp would take for all of it."""
    return hparams.rope.type == "longrope" and trained_context(hparams) != hparams.integer("max_position_embeddings")


def _longrope_factor(hparams: Hparams) -> float | None:
    factor = longrope_attention_factor(hparams)
    return None if factor == 1 else factor


def _factor(hparams: Hparams) -> float | None:
    rope = hparams.rope
    return rope.number("factor") if rope.type in ("linear", "yarn") else None


def _attention_factor(hparams: Hparams) -> float | None:
    rope = hparams.rope
    name = "attention_factor" if rope.has("attention_factor") else "attn_factor"
    return rope.number(name) if rope.type == "yarn" and rope.has(name) else None


def _sections(hparams: Hparams) -> list[int] | None:
    """How many frequencies follow time, height and width of a picture's place; all follow the place of a text."""
    sections = hparams.rope.fields.get("mrope_section")
    if not isinstance(sections, list) or not all(type(n) is int and 0 <= n < 1 << 16 for n in sections):
        return None
    return [*sections, 0, 0, 0, 0][:4]


def _theta(hparams: Hparams) -> float | None:
    return hparams.rope.theta if hparams.rope.theta > 0 else None


def _gating(hparams: Hparams) -> int | None:
    if not hparams.has("scoring_func"):
        return None
    name = hparams.text("scoring_func")
    if name not in _GATING:
        raise UnsupportedError(
            f"config.json: 'scoring_func' is {name[:80]!r}, which llama.cpp does not compute",
            hint=f"Known: {', '.join(_GATING)}.",
            field="scoring_func",
        )
    return _GATING[name]


COMMON: Mapping[str, Getter] = {
    "context_length": integer("max_position_embeddings"),
    "embedding_length": integer("hidden_size"),
    "feed_forward_length": integer("intermediate_size"),
    "attention.head_count": integer("num_attention_heads"),
    "attention.head_count_kv": lambda hparams: (
        _integers(hparams, "num_key_value_heads") if hparams.has("num_key_value_heads") else hparams.n_heads
    ),
    "rope.scaling.type": _scaling_type,
    "rope.scaling.factor": _factor,
    "rope.scaling.original_context_length": _trained_context,
    "rope.scaling.attn_factor": _longrope_factor,
    "rope.scaling.yarn_ext_factor": rope_number("extrapolation_factor"),
    "rope.scaling.yarn_attn_factor": _attention_factor,
    "rope.scaling.yarn_beta_fast": rope_number("beta_fast"),
    "rope.scaling.yarn_beta_slow": rope_number("beta_slow"),
    "rope.dimension_sections": _sections,
    "rope.freq_base": _theta,
    "attention.layer_norm_rms_epsilon": number("rms_norm_eps"),
    "attention.layer_norm_epsilon": number("layer_norm_eps"),
    "expert_count": natural("num_experts"),
    "expert_used_count": natural("num_experts_per_tok"),
    "expert_group_count": natural("n_group"),
    "expert_group_used_count": natural("topk_group"),
    "expert_gating_func": _gating,
    "attention.key_length": _given_head_dim,
    "attention.value_length": _given_head_dim,
}
"""Key -> value for a Llama-like model, in the order of llama.cpp's converter. A family's own `keys` go over these."""


NO_SCALING: Mapping[str, Getter] = {key: absent for key in COMMON if key.startswith("rope.scaling.")}
"""For families whose converter leaves the rope scaling to llama.cpp."""
