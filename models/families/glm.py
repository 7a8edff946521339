"""GLM 4, dense and mixture of experts."""

from dataclasses import replace

from models.families import ModelFamily
from models.families import vocabulary as rules
from models.families.keys import absent, fixed, flag, integer, natural, number, rotary_dim
from models.families.passes import drop, rename
from models.hparams import Hparams

_DEFAULTS = {
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "head_dim": 128,
}

# transformers, GlmConfig; llama.cpp takes the width of a head from the hidden size
GLM = ModelFamily(
    architectures=("GlmForCausalLM",),
    gguf_arch="chatglm",
    defaults=_DEFAULTS,
    requires={"head_dim": lambda hparams: (None, hparams.integer("hidden_size") // hparams.n_heads)},
    keys={"attention.key_length": absent, "attention.value_length": absent, "rope.dimension_count": rotary_dim},
    vocabulary=rules.GLM,
)

# transformers, Glm4Config
GLM4 = ModelFamily(
    architectures=("Glm4ForCausalLM",),
    gguf_arch="glm4",
    defaults=_DEFAULTS,
    keys={"rope.dimension_count": rotary_dim},
    vocabulary=rules.GLM4,
)


def extra_blocks(hparams: Hparams) -> int:
    """Blocks after the last that predict further tokens, if the checkpoint has them: transformers saves none."""
    first = hparams.n_layers
    n = hparams.natural("num_nextn_predict_layers") if hparams.has("num_nextn_predict_layers") else 0
    saved = any(name.startswith(f"model.layers.{first}.") for name in hparams.tensors)
    return n if saved else 0


# transformers, Glm4MoeConfig
GLM4_MOE = replace(
    GLM4,
    architectures=("Glm4MoeForCausalLM",),
    gguf_arch="glm4moe",
    defaults={
        **_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    keys={
        **GLM4.keys,
        "expert_gating_func": fixed(2),  # sigmoid
        "expert_feed_forward_length": integer("moe_intermediate_size"),
        "expert_shared_count": natural("n_shared_experts"),
        "leading_dense_block_count": natural("first_k_dense_replace"),
        "expert_weights_scale": number("routed_scaling_factor"),
        "expert_weights_norm": flag("norm_topk_prob"),
        "nextn_predict_layers": lambda hparams: extra_blocks(hparams) or None,
    },
    ignored=("use_qk_norm",),  # the tensors tell
    n_blocks=lambda hparams: hparams.n_layers + extra_blocks(hparams),
    vocabulary=rules.GLM4_MOE,
)


def _chatglm_kv(hparams: Hparams) -> int:
    return hparams.integer("multi_query_group_num") if hparams.flag("multi_query_attention") else hparams.n_heads


# The code beside the checkpoints of ChatGLM 3 and GLM-4-9B
CHATGLM = ModelFamily(
    architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    gguf_arch="chatglm",
    defaults={"rope_ratio": 1, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    aliases={
        "vocab_size": "padded_vocab_size",
        "max_position_embeddings": "seq_length",
        "rms_norm_eps": "layernorm_epsilon",
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "head_dim": "kv_channels",
    },
    requires={
        "rmsnorm": (None, True),
        "post_layer_norm": (None, True),
        "apply_residual_connection_post_layernorm": (None, False),
        "original_rope": (None, True),
        "attention_softmax_in_fp32": (None, True),
    },
    keys={
        "attention.key_length": absent,
        "attention.value_length": absent,
        "attention.head_count_kv": _chatglm_kv,
        "rope.dimension_count": rotary_dim,
        "rope.freq_base": lambda hparams: 10000.0 * hparams.number("rope_ratio"),
    },
    passes=(rename(r"transformer\.(.*)", r"\1"), drop(r".*rotary_pos_emb\.inv_freq")),
    ignored=(
        "apply_query_key_layer_scaling",
        "bias_dropout_fusion",
        "fp32_residual_connection",
        "interleaved_qkv",
        "pre_seq_len",
        "prefix_projection",
        "quantization_bit",
    ),
    vocabulary=rules.CHATGLM3,
)
