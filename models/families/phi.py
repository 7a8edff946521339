"""Phi 2, and Phi 3 to 4 with their mixture of experts."""

from dataclasses import replace

from models.errors import UnsupportedError
from models.families import ModelFamily
from models.families import vocabulary as rules
from models.families.keys import (
    NO_SCALING,
    absent,
    longrope_attention_factor,
    other_theta,
    rotary_dim,
    trained_context,
)
from models.hparams import Hparams

# transformers, PhiConfig; llama.cpp expects a feed-forward network of four times the width, and heads without groups
PHI2 = ModelFamily(
    architectures=("PhiForCausalLM",),
    gguf_arch="phi2",
    defaults={
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "hidden_act": "gelu_new",
    },
    requires={
        "hidden_act": ("gelu_new",),
        "qk_layernorm": (None, False),
        "num_key_value_heads": lambda hparams: (None, hparams.n_heads),
        "intermediate_size": lambda hparams: (None, 4 * hparams.integer("hidden_size")),
    },
    keys={
        "feed_forward_length": lambda hparams: 4 * hparams.integer("hidden_size"),
        "attention.key_length": absent,
        "attention.value_length": absent,
        "rope.dimension_count": rotary_dim,
        "rope.freq_base": other_theta(10000.0),
    },
    vocabulary=rules.PHI2,
)


# The code beside Phi-4-mini knows two more fields, and what to do with other values of them it does not say
_PHI4_MINI = {"full_attn_mod": (None, 1), "interpolate_factor": (None, 1)}

# transformers, Phi3Config; llama.cpp does not look at its window: equal up to it, and a note says so
PHI3 = ModelFamily(
    architectures=("Phi3ForCausalLM",),
    gguf_arch="phi3",
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    requires=_PHI4_MINI,
    keys={
        **NO_SCALING,
        "attention.key_length": absent,
        "attention.value_length": absent,
        "rope.scaling.original_context_length": trained_context,
        "rope.scaling.attn_factor": longrope_attention_factor,
        "rope.dimension_count": rotary_dim,
        "attention.sliding_window": lambda hparams: (
            hparams.natural("sliding_window") if hparams.has("sliding_window") else 0
        ),
    },
    ignored=("sliding_window",),
)


def _turned_by(hparams: Hparams) -> float | None:
    """What sine and cosine are multiplied by: its scaling says so itself, for short texts and long ones."""
    rope = hparams.rope
    if rope.type != "longrope" or not rope.has("long_mscale"):
        return longrope_attention_factor(hparams)
    short, long = rope.number("short_mscale"), rope.number("long_mscale")
    if short != long:
        raise UnsupportedError(
            f"config.json: 'short_mscale' is {short:g} and 'long_mscale' {long:g}: llama.cpp knows one for all texts",
            field="short_mscale",
        )
    return long


# transformers, PhimoeConfig
PHI_MOE = replace(
    PHI3,
    architectures=("PhiMoEForCausalLM", "PhimoeForCausalLM"),
    gguf_arch="phimoe",
    defaults={
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts": 16,
        "num_experts_per_tok": 2,
    },
    keys={**PHI3.keys, "rope.scaling.attn_factor": _turned_by},
    ignored=(*PHI3.ignored, "input_jitter_noise", "router_jitter_noise"),
    note=lambda hparams: (
        "llama.cpp weighs the experts of Phi-MoE otherwise than it was trained (sparsemixer): answers may differ"
    ),
)
