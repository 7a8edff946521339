"""ERNIE 4.5, dense and mixture of experts."""

from dataclasses import replace

from models.families import ModelFamily
from models.families import vocabulary as rules
from models.families.keys import integer, natural
from models.families.passes import drop, halves, rename, split
from models.hparams import Hparams


def _parts(hparams: Hparams) -> list[tuple[str, int]]:
    """Of the fused matrix that the checkpoints for Paddle have."""
    rows, rows_kv = hparams.n_heads * hparams.head_dim, hparams.n_heads_kv * hparams.head_dim
    return [(rf"\1.{name}_proj.weight", n) for name, n in (("q", rows), ("k", rows_kv), ("v", rows_kv))]


# transformers, Ernie4_5Config
ERNIE4_5 = ModelFamily(
    architectures=("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
    gguf_arch="ernie4_5",
    defaults={
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    requires={"use_bias": (None, False), "compression_ratio": (None, 1, 1.0)},
    passes=(
        rename(r"ernie\.(.*)", r"model.\1"),
        split(r"(.*\.self_attn)\.qkv_proj\.weight", _parts),
        halves(r"(.*)\.up_gate_proj\.weight", r"\1.gate_proj.weight", r"\1.up_proj.weight"),
    ),
    vocabulary=rules.ERNIE,
)

# transformers, Ernie4_5_MoeConfig
ERNIE4_5_MOE = replace(
    ERNIE4_5,
    architectures=("Ernie4_5_MoeForCausalLM",),
    gguf_arch="ernie4_5-moe",
    defaults={
        **{name: value for name, value in ERNIE4_5.defaults.items() if name != "head_dim"},
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1536,
        "moe_num_shared_experts": 2,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
    },
    requires={
        **ERNIE4_5.requires,
        "moe_layer_interval": (1,),  # llama.cpp looks for experts in every block after the first ones
        "moe_layer_end_index": lambda hparams: (None, -1, hparams.n_layers - 1, hparams.n_layers),
    },
    keys={
        "interleave_moe_layer_step": integer("moe_layer_interval"),
        "leading_dense_block_count": natural("moe_layer_start_index"),
        "expert_feed_forward_length": integer("moe_intermediate_size"),
        "expert_shared_count": natural("moe_num_shared_experts"),
        "expert_shared_feed_forward_length": lambda hparams: (
            hparams.integer("moe_intermediate_size") * hparams.natural("moe_num_shared_experts") or None
        ),
    },
    passes=(*ERNIE4_5.passes, drop(r"model\.mtp_.*")),
    ignored=("moe_norm_min", "moe_capacity", "moe_gate", "moe_use_aux_free", "num_nextn_predict_layers"),
)
