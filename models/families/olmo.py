"""OLMo 1 to 3 and OLMoE."""

from dataclasses import replace

from models.families import ModelFamily
from models.families.keys import fixed, integer, number, sliding_pattern
from models.families.passes import halves, interleaved_rope, rename, split
from models.hparams import Hparams

_FIRST = r"model\.transformer\."
_BLOCK, _LAYER = rf"{_FIRST}blocks\.(\d+)\.", r"model.layers.\1."


def _queries_keys_values(hparams: Hparams) -> list[tuple[str, int]]:
    counts = {"q": hparams.n_heads, "k": hparams.n_heads_kv, "v": hparams.n_heads_kv}
    return [(f"{_LAYER}self_attn.{part}_proj.weight", n * hparams.head_dim) for part, n in counts.items()]


def _both_halves(hparams: Hparams) -> int:
    """Rows of the matrix that is split into what is gated and the gate."""
    by_ratio = hparams.integer("mlp_ratio") * hparams.integer("hidden_size")
    return hparams.integer("mlp_hidden_size") if hparams.has("mlp_hidden_size") else by_ratio


# The code beside its first checkpoints (hf_olmo), with names of its own
_OLMO_FIRST = ModelFamily(
    architectures=(),
    gguf_arch="olmo",
    defaults={"max_position_embeddings": 1024, "rope_theta": 10000.0, "mlp_ratio": 4, "weight_tying": True},
    aliases={"tie_word_embeddings": "weight_tying"},
    requires={
        "activation_type": ("swiglu",),
        "rope": (True,),
        "block_type": (None, "sequential"),
        "layer_norm_type": (None, "default"),
        "layer_norm_with_affine": (False,),
    },
    keys={
        "attention.layer_norm_epsilon": fixed(1e-5),
        "attention.clamp_kqv": number("clip_qkv"),
        "feed_forward_length": lambda hparams: _both_halves(hparams) // 2,
    },
    passes=(
        rename(rf"{_FIRST}wte\.weight", "model.embed_tokens.weight"),
        rename(rf"{_FIRST}ff_out\.weight", "lm_head.weight"),
        split(rf"{_BLOCK}att_proj\.weight", _queries_keys_values),
        halves(rf"{_BLOCK}ff_proj\.weight", f"{_LAYER}mlp.up_proj.weight", f"{_LAYER}mlp.gate_proj.weight"),
        rename(rf"{_BLOCK}attn_out\.weight", f"{_LAYER}self_attn.o_proj.weight"),
        rename(rf"{_BLOCK}ff_out\.weight", f"{_LAYER}mlp.down_proj.weight"),
        *interleaved_rope(),
    ),
    ignored=("embedding_size", "precision", "rope_full_precision"),
)

# transformers, OlmoConfig; its norms have no weights
OLMO = ModelFamily(
    architectures=("OlmoForCausalLM", "OLMoForCausalLM"),
    gguf_arch="olmo",
    defaults={"max_position_embeddings": 2048, "rope_theta": 10000.0},
    keys={"attention.layer_norm_epsilon": fixed(1e-5), "attention.clamp_kqv": number("clip_qkv")},
    passes=interleaved_rope(),
    variant=lambda hparams: _OLMO_FIRST if hparams.has("activation_type") else None,
)

# transformers, Olmo2Config
OLMO2 = ModelFamily(
    architectures=("Olmo2ForCausalLM",),
    gguf_arch="olmo2",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
)

# transformers, Olmo3Config; its window layers know no scaling of rope, in llama.cpp either
OLMO3 = replace(
    OLMO2,
    architectures=("Olmo3ForCausalLM",),
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "sliding_window": 4096},
    keys={
        "attention.sliding_window": integer("sliding_window"),
        "attention.sliding_window_pattern": sliding_pattern(4, always=True),
        "rope.freq_base_swa": lambda hparams: hparams.rope_of("sliding_attention").theta,
    },
)

# transformers, OlmoeConfig; llama.cpp neither clamps nor normalises here
OLMOE = ModelFamily(
    architectures=("OlmoeForCausalLM",),
    gguf_arch="olmoe",
    defaults={
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
    requires={"clip_qkv": (None,), "norm_topk_prob": (None, False)},
)
