"""LFM2, convolutions and attention, dense and mixture of experts."""

from dataclasses import replace

from models.families import ModelFamily
from models.families.keys import fixed, integer, natural
from models.families.passes import change, rename
from models.hparams import Hparams


def _heads_kv(hparams: Hparams) -> list[int]:
    """Blocks of a convolution have none. Older configs name the blocks that attend instead."""
    if hparams.has("layer_types"):
        attends = [kind == "full_attention" for kind in hparams.items("layer_types")]
    else:
        attending = hparams.naturals("full_attn_idxs")
        attends = [block in attending for block in range(hparams.n_layers)]
    return [hparams.n_heads_kv if attend else 0 for attend in attends]


def _adjusted_width(hparams: Hparams) -> int:
    """Source: transformers, Lfm2MLP."""
    usual = hparams.integer("intermediate_size")
    width = hparams.integer("block_ff_dim") if hparams.has("block_ff_dim") else usual
    if not hparams.flag("block_auto_adjust_ff_dim"):
        return width
    width = int(2 * width / 3)
    if hparams.has("block_ffn_dim_multiplier"):
        width = int(hparams.number("block_ffn_dim_multiplier") * width)
    multiple = hparams.integer("block_multiple_of")
    return multiple * -(-width // multiple)


# transformers, Lfm2Config
LFM2 = ModelFamily(
    architectures=("Lfm2ForCausalLM", "LFM2ForCausalLM"),
    gguf_arch="lfm2",
    defaults={
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "conv_L_cache": 3,
        "intermediate_size": 12288,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
    keys={
        "attention.head_count_kv": _heads_kv,
        "feed_forward_length": _adjusted_width,
        "vocab_size": integer("vocab_size"),
        "shortconv.l_cache": integer("conv_L_cache"),
    },
    passes=(change(r".*\.conv\.conv\.weight", lambda weights, hparams: weights.reshaped(weights.shape[0], -1)),),
    ignored=(
        "block_dim",
        "block_mlp_init_scale",
        "block_norm_eps",
        "block_out_init_scale",
        "block_use_swiglu",
        "block_use_xavier_init",
        "conv_dim",
        "conv_dim_out",
        "conv_use_xavier_init",
        "full_attn_idxs",
        "num_heads",
        "theta",
        "use_pos_enc",
    ),
)

# transformers, Lfm2MoeConfig
LFM2_MOE = replace(
    LFM2,
    architectures=("Lfm2MoeForCausalLM",),
    gguf_arch="lfm2moe",
    defaults={
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "conv_L_cache": 3,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1792,
        "num_dense_layers": 2,
    },
    requires={"norm_topk_prob": (None, True), "routed_scaling_factor": (None, 1, 1.0)},
    keys={
        "attention.head_count_kv": _heads_kv,
        "expert_feed_forward_length": integer("moe_intermediate_size"),
        "leading_dense_block_count": natural("num_dense_layers"),
        "expert_gating_func": fixed(2),  # sigmoid
        "vocab_size": integer("vocab_size"),
        "shortconv.l_cache": integer("conv_L_cache"),
    },
    passes=(
        *LFM2.passes,
        rename(r"(.*\.expert_bias)", r"\1.bias"),
        rename(r"model\.(layers\.\d+\.feed_forward\.experts\..*)", r"\1"),
    ),
    ignored=(*LFM2.ignored, "use_expert_bias"),
)
