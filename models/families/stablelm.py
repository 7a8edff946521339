"""StableLM 2 and Starcoder 2."""

from models.families import ModelFamily
from models.families.keys import absent, flag, other_theta, rotary_dim
from models.families.passes import stack
from models.hparams import Hparams


def _eps(hparams: Hparams) -> float:
    """The code beside the first checkpoints has its own name for it."""
    usual = hparams.number("layer_norm_eps")
    return hparams.number("norm_eps") if hparams.has("norm_eps") else usual


# transformers, StableLmConfig
STABLELM = ModelFamily(
    architectures=("StableLmForCausalLM", "StableLMEpochForCausalLM"),
    gguf_arch="stablelm",
    defaults={
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "use_parallel_residual": False,
    },
    requires={
        "num_heads": lambda hparams: (None, hparams.n_heads),
        "rotary_scaling_factor": (None, 1, 1.0),
    },
    keys={
        "attention.key_length": absent,
        "attention.value_length": absent,
        "attention.layer_norm_epsilon": _eps,
        "attention.layer_norm_rms_epsilon": absent,
        "rope.dimension_count": rotary_dim,
        "rope.freq_base": other_theta(10000.0),
        "use_parallel_residual": flag("use_parallel_residual"),
    },
    passes=(stack(r"(.*\.[qk]_layernorm)\.norms\.(?P<n>\d+)\.weight", r"\1.weight"),),
    ignored=("qk_layernorm",),  # the tensors tell
)

# transformers, Starcoder2Config
STARCODER2 = ModelFamily(
    architectures=("Starcoder2ForCausalLM",),
    gguf_arch="starcoder2",
    defaults={
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    requires={
        "hidden_act": ("gelu_pytorch_tanh",),
        "norm_type": (None, "layer_norm"),
        "mlp_type": (None, "default"),
    },
    ignored=("sliding_window", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "scale_attn_weights"),
)
