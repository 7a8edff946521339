"""Llama 4, the text part."""

from models.families import ModelFamily
from models.families.keys import every_nth, head_dim, integer
from models.families.passes import transposed
from models.hparams import Hparams


def _all_see_all(hparams: Hparams) -> bool:
    return hparams.has("layer_types") and set(hparams.items("layer_types")) == {"full_attention"}


def _moe_layers(hparams: Hparams) -> tuple[object, ...]:
    """Every block that the step names has experts."""
    step = hparams.integer("interleave_moe_layer_step")
    return None, list(range(step - 1, hparams.n_layers, step))


# transformers, Llama4Config, Llama4TextConfig; llama.cpp has the numbers of attention in its code
LLAMA4 = ModelFamily(
    architectures=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    gguf_arch="llama4",
    defaults={
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "head_dim": 128,
        "num_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
    },
    requires={
        "no_rope_layers": lambda hparams: (*every_nth(4, 0, others=1)(hparams), []),
        "no_rope_layer_interval": (None, 4),
        "layer_types": lambda hparams: (
            None,
            ["full_attention"] * hparams.n_layers,
            every_nth(4, "full_attention", others="chunked_attention")(hparams)[1],
        ),
        "attention_chunk_size": (None, 8192),
        "attn_temperature_tuning": (True, 4),
        "floor_scale": (None, 8192, 8192.0),
        "attn_scale": (None, 0.1),
        "use_qk_norm": lambda hparams: (hparams.integer("num_experts") != 128,),
        "moe_layers": _moe_layers,
    },
    keys={
        "feed_forward_length": integer("intermediate_size_mlp"),
        "vocab_size": integer("vocab_size"),
        "rope.dimension_count": head_dim,
        "interleave_moe_layer_step": integer("interleave_moe_layer_step"),
        "expert_feed_forward_length": integer("intermediate_size"),
        "attention.sliding_window": lambda hparams: 0 if _all_see_all(hparams) else None,
    },
    passes=(transposed(r".*\.experts\.(gate_up_proj|down_proj)"),),
    ignored=("for_llm_compressor",),
)
