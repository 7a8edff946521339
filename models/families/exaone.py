"""EXAONE 3 and 4, and Seed-OSS."""

from models.families import ModelFamily
from models.families.keys import absent, head_dim, integer, number, sliding_pattern
from models.hparams import Hparams

# The code beside its checkpoints
EXAONE3 = ModelFamily(
    architectures=("ExaoneForCausalLM",),
    gguf_arch="exaone",
    defaults={"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "rope_theta": 10000.0},
    keys={
        "attention.layer_norm_epsilon": absent,
        "attention.layer_norm_rms_epsilon": number("layer_norm_eps"),
        "rope.dimension_count": head_dim,
    },
)


def _windows(hparams: Hparams) -> tuple[object, ...]:
    """llama.cpp knows the model with windows by its 64 blocks; in others it has none, and rope everywhere."""
    full = ["full_attention"] * hparams.n_layers
    given = hparams.get("layer_types")
    return (None, full) if hparams.n_layers != 64 or not hparams.has("sliding_window") else (given,)


def _has_windows(hparams: Hparams) -> bool:
    return hparams.has("sliding_window") and hparams.n_layers == 64


# transformers, Exaone4Config
EXAONE4 = ModelFamily(
    architectures=("Exaone4ForCausalLM",),
    gguf_arch="exaone4",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    requires={
        "layer_types": _windows,
        "sliding_window_pattern": lambda hparams: (None, 4, "LLLG") if _has_windows(hparams) else (None, 0, 4),
    },
    keys={
        "vocab_size": integer("vocab_size"),
        "attention.sliding_window": lambda hparams: (
            hparams.integer("sliding_window") if _has_windows(hparams) else None
        ),
        "attention.sliding_window_pattern": lambda hparams: (
            sliding_pattern(4, always=True)(hparams) if _has_windows(hparams) else None
        ),
    },
    ignored=("sliding_window",),
)

# transformers, SeedOssConfig
SEED_OSS = ModelFamily(
    architectures=("SeedOssForCausalLM",),
    gguf_arch="seed_oss",
    defaults={"max_position_embeddings": 524288, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "head_dim": 128},
)
