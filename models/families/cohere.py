"""Command R (Cohere 1) and Command R7B (Cohere 2)."""

from models.families import ModelFamily
from models.families.keys import fixed, integer, number, rotary_dim, sliding_pattern
from models.hparams import Hparams

_DEFAULTS = {
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "logit_scale": 0.0625,
}


def _context(hparams: Hparams) -> int:
    """The first model says 8,192, and how much more it has been made for in the field of a tokenizer."""
    usual = hparams.integer("max_position_embeddings")
    return hparams.integer("model_max_length") if hparams.has("model_max_length") else usual


# transformers, CohereConfig; llama.cpp looks for norms of queries and keys in the models of 64 blocks only
COHERE = ModelFamily(
    architectures=("CohereForCausalLM",),
    gguf_arch="command-r",
    defaults={**_DEFAULTS, "rope_theta": 500000.0},
    requires={"use_qk_norm": lambda hparams: (None, False, True) if hparams.n_layers >= 64 else (None, False)},
    keys={
        "context_length": _context,
        "logit_scale": number("logit_scale"),
        "rope.scaling.type": fixed("none"),
    },
)

# transformers, Cohere2Config
COHERE2 = ModelFamily(
    architectures=("Cohere2ForCausalLM",),
    gguf_arch="cohere2",
    defaults={**_DEFAULTS, "rope_theta": 10000.0, "sliding_window": 4096},
    requires={
        "sliding_window_pattern": (None, 4),
        "layer_switch": (None, 4),
        "order_of_interleaved_layers": (None, "local_attn_first"),
        "position_embedding_type": (None, "rope_gptj"),
        "use_gated_activation": (None, True),
        "use_parallel_block": (None, True),
        "use_qk_norm": (None, False),
    },
    keys={
        "logit_scale": number("logit_scale"),
        "attention.sliding_window": integer("sliding_window"),
        "attention.sliding_window_pattern": sliding_pattern(4),
        "vocab_size": integer("vocab_size"),
        "rope.dimension_count": rotary_dim,
        "rope.scaling.type": fixed("none"),
    },
    ignored=("use_embedding_sharing", "use_parallel_embedding"),
)
