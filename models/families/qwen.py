"""Qwen 1 to 3, dense and mixtures of experts, and the text part of Qwen 2 to 3 VL."""

from dataclasses import replace

from models.families import ModelFamily
from models.families import vocabulary as rules
from models.families.keys import absent, head_dim, integer, number
from models.hparams import Hparams

_NO_WINDOW = ("sliding_window", "max_window_layers")  # of a window that is not in use

# transformers, Qwen2Config
QWEN2 = ModelFamily(
    architectures=("Qwen2ForCausalLM",),
    gguf_arch="qwen2",
    defaults={"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    requires={"use_sliding_window": (None, False)},
    ignored=_NO_WINDOW,
)

# transformers, Qwen3Config; no layer of it has biases in llama.cpp
QWEN3 = replace(
    QWEN2,
    architectures=("Qwen3ForCausalLM",),
    gguf_arch="qwen3",
    defaults={**QWEN2.defaults, "head_dim": 128},
    requires={**QWEN2.requires, "attention_bias": (None, False)},
)

# transformers, Qwen2VLConfig, Qwen2_5_VLConfig: the part that reads text
QWEN2_VL = replace(
    QWEN2,
    architectures=("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
    gguf_arch="qwen2vl",
    defaults={**QWEN2.defaults, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0},
)


def _layers_of_pictures(hparams: Hparams) -> int:
    """How many layers of the part that sees are given to layers here."""
    vision = hparams.get("vision_config")
    found = vision.get("deepstack_visual_indexes") if isinstance(vision, dict) else None
    return len(found) if isinstance(found, list) else 0


# transformers, Qwen3VLConfig: the part that reads text
QWEN3_VL = replace(
    QWEN3,
    architectures=("Qwen3VLForConditionalGeneration",),
    gguf_arch="qwen3vl",
    keys={"n_deepstack_layers": _layers_of_pictures},
)

# llama.cpp has experts in every block of these two
_ALL_EXPERTS = {"decoder_sparse_step": (None, 1), "mlp_only_layers": (None, [])}

# transformers, Qwen2MoeConfig; llama.cpp does not normalise the weights of its experts
QWEN2_MOE = replace(
    QWEN2,
    architectures=("Qwen2MoeForCausalLM",),
    gguf_arch="qwen2moe",
    defaults={
        **QWEN2.defaults,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
    },
    requires={**QWEN2.requires, **_ALL_EXPERTS, "norm_topk_prob": (None, False)},
    keys={
        "expert_feed_forward_length": integer("moe_intermediate_size"),
        "expert_shared_feed_forward_length": integer("shared_expert_intermediate_size"),
    },
)

# transformers, Qwen3MoeConfig; llama.cpp always normalises here
QWEN3_MOE = replace(
    QWEN3,
    architectures=("Qwen3MoeForCausalLM",),
    gguf_arch="qwen3moe",
    defaults={**QWEN2.defaults, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128},
    requires={**QWEN3.requires, **_ALL_EXPERTS, "norm_topk_prob": (True,)},
    keys={"expert_feed_forward_length": integer("moe_intermediate_size")},
)

# The code beside its checkpoints; what it does beyond the trained length llama.cpp does not
QWEN1 = ModelFamily(
    architectures=("QWenLMHeadModel",),
    gguf_arch="qwen",
    defaults={"max_position_embeddings": 8192, "layer_norm_eps": 1e-6, "rope_theta": 10000.0},
    requires={
        "kv_channels": lambda hparams: (None, hparams.integer("hidden_size") // hparams.n_heads),
        "rotary_pct": (None, 1, 1.0),
        "scale_attn_weights": (None, True),
    },
    keys={
        "attention.head_count_kv": absent,
        "attention.layer_norm_epsilon": absent,
        "attention.layer_norm_rms_epsilon": number("layer_norm_eps"),
        "rope.dimension_count": head_dim,
    },
    ignored=("use_dynamic_ntk", "use_logn_attn", "softmax_in_fp32", "onnx_safe", "no_bias"),
    vocabulary=rules.QWEN1,
)
