"""Mamba 1 and 2, Falcon Mamba."""

from models.families import ModelFamily
from models.families.keys import NO_SCALING, absent, fixed, integer, number
from models.families.passes import change, column, flat, negative_exponential, rename
from models.hparams import Hparams
from models.weights import Weights

_NO_ROPE = {"rope_theta": 1}
_ANY_LENGTH = 1 << 20
_SEEN_IN_TRAINING = (
    "time_step_scale",
    "time_step_min",
    "time_step_max",
    "time_step_floor",
    "time_step_init_scheme",
    "residual_in_fp32",
    "use_associative_scan",
    "chunk_size",
    "use_mamba_kernels",
    "use_mem_eff_path",
    "use_falcon_mambapy",
)

UNLIMITED = (None, [0.0, float("inf")], [0.0, {"__float__": "Infinity"}])
"""The values of `time_step_limit` that limit nothing, in the spellings of transformers."""

NO_ATTENTION = {
    **NO_SCALING,
    "context_length": fixed(_ANY_LENGTH),
    "feed_forward_length": fixed(0),
    "attention.head_count": fixed(0),
    "attention.head_count_kv": absent,
    "attention.key_length": absent,
    "attention.value_length": absent,
    "attention.layer_norm_epsilon": absent,
    "rope.dimension_sections": absent,
    "rope.freq_base": absent,
}


def _time_step_rank(hparams: Hparams) -> int:
    if isinstance(hparams.get("time_step_rank"), int):
        return hparams.integer("time_step_rank")
    return -(hparams.integer("hidden_size") // -16)


def _width(hparams: Hparams) -> int:
    return 2 * hparams.integer("hidden_size")


def _of_this_width(hparams: Hparams) -> tuple[object, ...]:
    return None, _width(hparams)


def _expansions(hparams: Hparams) -> tuple[object, ...]:
    """Falcon Mamba's config has another factor than its width, which counts."""
    return (hparams.get("expand"),) if hparams.has("intermediate_size") else (None, 2)


# transformers, MambaConfig, FalconMambaConfig; llama.cpp norms time steps and states with the eps of all norms
MAMBA = ModelFamily(
    architectures=("MambaForCausalLM", "FalconMambaForCausalLM"),
    gguf_arch="mamba",
    defaults={
        "layer_norm_eps": 1e-5,
        "state_size": 16,
        "conv_kernel": 4,
        "tie_word_embeddings": True,
        "rope_theta": 1,
    },
    requires={"expand": _expansions, "intermediate_size": _of_this_width, "d_inner": _of_this_width},
    keys={
        **NO_ATTENTION,
        "ssm.conv_kernel": integer("conv_kernel"),
        "ssm.inner_size": _width,
        "ssm.state_size": integer("state_size"),
        "ssm.time_step_rank": _time_step_rank,
        "attention.layer_norm_rms_epsilon": number("layer_norm_eps"),
        "ssm.dt_b_c_rms": lambda hparams: hparams.get("model_type") == "falcon_mamba",
    },
    passes=(change(r".*\.conv1d\.weight", flat), change(r".*\.A_log", negative_exponential)),
    ignored=(*_SEEN_IN_TRAINING, "mixer_rms_eps", "pad_vocab_size_multiple", "ssm_cfg", "rms_norm", "fused_add_norm"),
)


def _grouped(weights: Weights, hparams: Hparams) -> Weights:
    return weights.reshaped(hparams.integer("n_groups"), -1)


# transformers, Mamba2Config
MAMBA2 = ModelFamily(
    architectures=("Mamba2ForCausalLM",),
    gguf_arch="mamba2",
    defaults={
        "layer_norm_eps": 1e-5,
        "state_size": 128,
        "conv_kernel": 4,
        "n_groups": 8,
        "head_dim": 64,
        "rope_theta": 1,
    },
    requires={"expand": (None, 2), "intermediate_size": _of_this_width, "time_step_limit": UNLIMITED},
    keys={
        **NO_ATTENTION,
        "ssm.conv_kernel": integer("conv_kernel"),
        "ssm.inner_size": _width,
        "ssm.state_size": integer("state_size"),
        "ssm.time_step_rank": lambda hparams: _width(hparams) // hparams.head_dim,
        "ssm.group_count": integer("n_groups"),
        "attention.layer_norm_rms_epsilon": number("layer_norm_eps"),
    },
    passes=(
        rename(r"model\.(backbone|lm_head)(.*)", r"\1\2"),
        rename(r"(.*)\.dt_bias", r"\1.dt_proj.bias"),
        change(r".*\.conv1d\.weight", flat),
        change(r".*\.A_log", negative_exponential),
        change(r".*\.mixer\.(A_log|D)", column),
        change(r".*\.mixer\.norm\.weight", _grouped),
    ),
    ignored=(*_SEEN_IN_TRAINING, "num_heads", "time_step_rank", "norm_before_gate", "rms_norm"),
)
