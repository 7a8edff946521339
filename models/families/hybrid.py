"""Granite 4, Nemotron-H and Falcon-H1: state spaces and attention."""

from dataclasses import replace

import numpy as np

from models.families import Getter, ModelFamily, Pass, Tensors
from models.families.granite import EXPERTS, GRANITE, SHARED
from models.families.keys import absent, integer, natural, number
from models.families.mamba import UNLIMITED
from models.families.passes import change, column, flat, halves, negative_exponential, rename
from models.hparams import Hparams
from models.vocabulary_rules import VocabularyRules
from models.weights import Weights, concatenated

_ANY_LENGTH = 1 << 20
_STATE_SPACES = (
    rename(r"(.*)\.dt_bias", r"\1.dt_proj.bias"),
    change(r".*\.conv1d\.weight", flat),
    change(r".*\.A_log", negative_exponential),
    change(r".*\.(A_log|D)", column),
)


def _grouped(field: str, pattern: str = r".*\.mamba\.norm\.weight") -> Pass:
    """The norm of a state space, a row for each group of heads."""
    return change(pattern, lambda weights, hparams: weights.reshaped(hparams.integer(field), -1))


def _layer_kinds(hparams: Hparams) -> list[str]:
    """One letter a block: M for a state space, * for attention, E for experts, - for a feed-forward network."""
    letters = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "moe": "E", "mlp": "-"}
    fields = ("hybrid_override_pattern", "layers_block_type", "layer_types")
    for given in [hparams.get(name) for name in fields]:
        if isinstance(given, str):
            return list(given)
        if isinstance(given, list):
            return [letters.get(str(kind), "?") for kind in given]
    return []


# Granite


def _granite_heads_kv(hparams: Hparams) -> list[int]:
    return [hparams.n_heads_kv if kind == "*" else 0 for kind in _layer_kinds(hparams)]


def _rotates(hparams: Hparams) -> bool:
    return bool(hparams.get("position_embedding_type") == "rope")


def _granite_ffn(tensors: Tensors, hparams: Hparams) -> Tensors:
    """Without experts, what all blocks share is the feed-forward network."""
    if hparams.get("num_experts"):
        return SHARED(tensors, hparams)
    gate_and_up = halves(
        r"(.*)\.shared_mlp\.input_linear\.weight", r"\1.mlp.gate_proj.weight", r"\1.mlp.up_proj.weight"
    )
    down = rename(r"(.*)\.shared_mlp\.output_linear\.weight", r"\1.mlp.down_proj.weight")
    return down(gate_and_up(tensors, hparams), hparams)


# transformers, GraniteMoeHybridConfig; its attention blocks know no positions unless all blocks attend
GRANITE_HYBRID = replace(
    GRANITE,
    architectures=("GraniteMoeHybridForCausalLM",),
    gguf_arch="granitehybrid",
    defaults={
        **GRANITE.defaults,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 1024,
        "mamba_n_heads": 128,
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
    },
    requires={
        "time_step_limit": UNLIMITED,
        "normalization_function": (None, "rmsnorm"),
        "position_embedding_type": (None, "rope", "nope"),
    },
    keys={
        **GRANITE.keys,
        "context_length": lambda hparams: max(
            hparams.integer("max_position_embeddings"), 0 if _rotates(hparams) else _ANY_LENGTH
        ),
        "attention.head_count_kv": _granite_heads_kv,
        "expert_shared_feed_forward_length": integer("shared_intermediate_size"),
        "ssm.conv_kernel": integer("mamba_d_conv"),
        "ssm.state_size": integer("mamba_d_state"),
        "ssm.group_count": integer("mamba_n_groups"),
        "ssm.inner_size": lambda hparams: hparams.integer("mamba_expand") * hparams.integer("hidden_size"),
        "ssm.time_step_rank": integer("mamba_n_heads"),
        "rope.scaling.finetuned": _rotates,
    },
    passes=(*GRANITE.passes, *EXPERTS, _granite_ffn, *_STATE_SPACES, _grouped("mamba_n_groups")),
    ignored=("mamba_d_head", "mamba_chunk_size", "layers_block_type"),
    variant=lambda hparams: _granite_of_attention(hparams),
    vocabulary=VocabularyRules(),
)
_GRANITE_ATTENTION = replace(GRANITE_HYBRID, architectures=(), gguf_arch="granite")
_GRANITE_ATTENTION_MOE = replace(GRANITE_HYBRID, architectures=(), gguf_arch="granitemoe")


def _granite_of_attention(hparams: Hparams) -> ModelFamily | None:
    if "M" in _layer_kinds(hparams):
        return None
    return _GRANITE_ATTENTION_MOE if hparams.get("num_experts") else _GRANITE_ATTENTION


# Nemotron-H


def _for_kind(kinds: str, name: str) -> Getter:
    """A list with a size for each block of these kinds, 0 for the others."""
    return lambda hparams: [hparams.integer(name) if kind in kinds else 0 for kind in _layer_kinds(hparams)]


def _nemotron_head_dim(hparams: Hparams) -> int:
    usual = hparams.integer("head_dim")
    return hparams.integer("attention_head_dim") if hparams.has("attention_head_dim") else usual


# transformers, NemotronHConfig
NEMOTRON_H = ModelFamily(
    architectures=("NemotronHForCausalLM",),
    gguf_arch="nemotron_h",
    defaults={
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "ssm_state_size": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "conv_kernel": 4,
        "head_dim": 128,
        "mlp_hidden_act": "relu2",
    },
    requires={
        "mlp_hidden_act": ("relu2",),
        "mamba_hidden_act": (None, "silu"),
        "time_step_limit": UNLIMITED,
        "norm_topk_prob": (None, True, False),
        "num_hidden_layers": lambda hparams: (None, len(_layer_kinds(hparams))),
    },
    keys={
        "context_length": lambda hparams: max(hparams.integer("max_position_embeddings"), _ANY_LENGTH),
        "attention.head_count_kv": _for_kind("*", "num_key_value_heads"),
        "feed_forward_length": _for_kind("-", "intermediate_size"),
        "attention.key_length": _nemotron_head_dim,
        "attention.value_length": _nemotron_head_dim,
        "vocab_size": integer("vocab_size"),
        "rope.dimension_count": lambda hparams: hparams.integer("hidden_size") // hparams.n_heads,
        "rope.freq_base": absent,
        "rope.scaling.finetuned": lambda hparams: False,
        "ssm.conv_kernel": integer("conv_kernel"),
        "ssm.state_size": integer("ssm_state_size"),
        "ssm.group_count": integer("n_groups"),
        "ssm.inner_size": lambda hparams: hparams.integer("mamba_num_heads") * hparams.integer("mamba_head_dim"),
        "ssm.time_step_rank": integer("mamba_num_heads"),
        "expert_count": absent,
        "expert_used_count": absent,
        "expert_group_count": absent,
        "expert_group_used_count": absent,
    },
    passes=(
        rename(r"model\.(layers\..*|embeddings\..*|norm_f\..*)", r"backbone.\1"),
        *_STATE_SPACES,
        _grouped("n_groups", r".*\.mixer\.norm\.weight"),
    ),
    ignored=(
        "chunk_size",
        "expand",
        "mamba_ssm_cache_dtype",
        "num_logits_to_keep",
        "residual_in_fp32",
        "sliding_window",
        "time_step_floor",
        "time_step_max",
        "time_step_min",
        "time_step_rank",
        "use_mamba_kernels",
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "moe_shared_expert_overlap",
        "n_shared_experts",
        "num_experts",
        "n_routed_experts",
        "num_experts_per_tok",
        "mtp_layers_block_type",
        "intermediate_size",
    ),
    n_blocks=lambda hparams: len(_layer_kinds(hparams)),
    variant=lambda hparams: _nemotron_of_experts(hparams),
)
_NEMOTRON_H_MOE = replace(
    NEMOTRON_H,
    architectures=(),
    gguf_arch="nemotron_h_moe",
    keys={
        **{key: getter for key, getter in NEMOTRON_H.keys.items() if not key.startswith("expert_")},
        "feed_forward_length": _for_kind("E", "moe_intermediate_size"),
        "expert_feed_forward_length": integer("moe_intermediate_size"),
        "expert_shared_feed_forward_length": integer("moe_shared_expert_intermediate_size"),
        "expert_shared_count": natural("n_shared_experts"),
        "expert_weights_norm": lambda hparams: hparams.flag("norm_topk_prob"),
        "expert_weights_scale": number("routed_scaling_factor"),
        "moe_latent_size": integer("moe_latent_size"),
    },
    passes=(
        *NEMOTRON_H.passes,
        rename(r"(.*)\.dt_proj\.bias", r"\1.dt.bias"),
        rename(r"backbone\.(layers\.\d+)\.mixer\.(experts\..*)", r"model.\1.mlp.\2"),
    ),
)


def _nemotron_of_experts(hparams: Hparams) -> ModelFamily | None:
    return _NEMOTRON_H_MOE if "E" in _layer_kinds(hparams) else None


# Falcon-H1


def _times(pattern: str, *fields: str) -> Pass:
    """Factors that the model multiplies what goes through a matrix with, which llama.cpp finds in the matrix."""

    def scaled(weights: Weights, hparams: Hparams) -> Weights:
        for factor in [_factor(hparams, field) for field in fields]:
            weights = weights if factor == 1 else _scaled(weights, factor)
        return weights

    return change(pattern, scaled)


def _factor(hparams: Hparams, field: str) -> float:
    """A field, or with a number behind it one of a list: `mlp_multipliers.1`."""
    name, _, place = field.partition(".")
    if not hparams.has(name):
        return 1.0
    return hparams.numbers(name)[int(place)] if place else hparams.number(name)


def _state_space_input(weights: Weights, hparams: Hparams) -> Weights:
    """Gate, values, two projections of the state and time steps, over each other, each with its own factor."""
    width, state = hparams.integer("mamba_d_ssm"), hparams.integer("mamba_n_groups") * hparams.integer("mamba_d_state")
    ends = np.cumsum([width, width, state, state])
    parts = np.split(weights.grid, ends)
    weights = _scaled(weights, _factor(hparams, "ssm_in_multiplier"))
    factors = [_factor(hparams, f"ssm_multipliers.{i}") for i in range(len(parts))]
    return concatenated([_scaled(weights.pick(part), factor) for part, factor in zip(parts, factors, strict=True)])


def _scaled(weights: Weights, factor: float) -> Weights:
    return weights.mapped(lambda values: values * np.float32(factor))


def _own_output(tensors: Tensors, hparams: Hparams) -> Tensors:
    """A tied embedding that comes in and goes out with other factors becomes two matrices."""
    if "lm_head.weight" in tensors or "model.embed_tokens.weight" not in tensors:
        return tensors
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}


def _state_heads(hparams: Hparams) -> int:
    width, per_head = hparams.integer("mamba_d_ssm"), hparams.get("mamba_d_head")
    return width // hparams.integer("mamba_d_head") if isinstance(per_head, int) else hparams.integer("mamba_n_heads")


# transformers, FalconH1Config
FALCON_H1 = ModelFamily(
    architectures=("FalconH1ForCausalLM",),
    gguf_arch="falcon-h1",
    defaults={
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "mamba_d_ssm": 1024,
        "mamba_n_heads": 128,
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_rms_norm": False,
    },
    requires={
        "time_step_limit": UNLIMITED,
        "mamba_norm_before_gate": lambda hparams: (
            (None, False) if hparams.flag("mamba_rms_norm") else (None, False, True)
        ),
        "mamba_use_mlp": (None, True),
    },
    keys={
        "attention.key_length": lambda hparams: hparams.head_dim,
        "attention.value_length": lambda hparams: hparams.head_dim,
        "vocab_size": integer("vocab_size"),
        "ssm.conv_kernel": integer("mamba_d_conv"),
        "ssm.inner_size": integer("mamba_d_ssm"),
        "ssm.state_size": integer("mamba_d_state"),
        "ssm.time_step_rank": _state_heads,
        "ssm.group_count": integer("mamba_n_groups"),
    },
    passes=(
        _own_output,
        _times(r".*\.down_proj\.weight", "mlp_multipliers.1"),
        _times(r".*\.gate_proj\.weight", "mlp_multipliers.0"),
        _times(r".*\.k_proj\.weight", "key_multiplier", "attention_in_multiplier"),
        _times(r".*\.[qv]_proj\.weight", "attention_in_multiplier"),
        _times(r".*\.o_proj\.weight", "attention_out_multiplier"),
        _times(r".*\.out_proj\.weight", "ssm_out_multiplier"),
        change(r".*\.in_proj\.weight", _state_space_input),
        _times(r"lm_head\.weight", "lm_head_multiplier"),
        _times(r"model\.embed_tokens\.weight", "embedding_multiplier"),
        *_STATE_SPACES,
        _grouped("mamba_n_groups"),
    ),
    ignored=(
        "attn_layer_indices",
        "mamba_chunk_size",
        "mamba_expand",
        "mlp_expansion_factor",
        "num_logits_to_keep",
        "mamba_n_heads",
        "layer_types",
        "layers_block_type",
        "mamba_rms_norm",
    ),
)
