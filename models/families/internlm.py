"""InternLM 2 and 3, MiniCPM."""

from collections.abc import Iterable
from dataclasses import replace
from re import Match

from models.families import ModelFamily
from models.families import vocabulary as rules
from models.families.keys import absent, integer, number, other_theta
from models.families.llama import LLAMA
from models.families.passes import each, interleave_halves, interleaved_rope
from models.hparams import Hparams
from models.weights import Weights


def _by_group(weights: Weights, hparams: Hparams, match: Match[str]) -> Iterable[tuple[str, Weights]]:
    """Each group of queries with its key and its value."""
    n_groups = hparams.n_heads_kv
    groups = weights.grid.reshape(n_groups, hparams.n_heads // n_groups + 2, -1)
    queries, keys = weights.pick(groups[:, :-2].reshape(-1)), weights.pick(groups[:, -2].reshape(-1))
    yield f"{match[1]}.wq.{match[2]}", interleave_halves(queries, hparams.n_heads)
    yield f"{match[1]}.wk.{match[2]}", interleave_halves(keys, n_groups)
    yield f"{match[1]}.wv.{match[2]}", weights.pick(groups[:, -1].reshape(-1))


# The code beside its checkpoints
INTERNLM2 = ModelFamily(
    architectures=("InternLM2ForCausalLM",),
    gguf_arch="internlm2",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    keys={"attention.key_length": absent, "attention.value_length": absent},
    passes=(each(r"(.*\.attention)\.wqkv\.(weight|bias)", _by_group),),
    vocabulary=rules.INTERNLM2,
)

# The code beside its checkpoints: a llama with its own names for biases
INTERNLM3 = replace(
    LLAMA,
    architectures=("InternLM3ForCausalLM",),
    defaults={"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    vocabulary=rules.INTERNLM3,
)


def _residual_scale(hparams: Hparams) -> float:
    return float(hparams.number("scale_depth") / hparams.n_layers**0.5)


# The code beside its checkpoints
MINICPM = ModelFamily(
    architectures=("MiniCPMForCausalLM",),
    gguf_arch="minicpm",
    defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "scale_emb": 1,
        "scale_depth": 1.0,
        "dim_model_base": 1,
    },
    keys={
        "attention.key_length": absent,
        "attention.value_length": absent,
        "embedding_scale": number("scale_emb"),
        "residual_scale": _residual_scale,
        "logit_scale": lambda hparams: hparams.integer("hidden_size") / hparams.integer("dim_model_base"),
    },
    passes=interleaved_rope(),
    requires={"sparse_config": (None,), "mup_denominator": (None, 32)},
)

# transformers, MiniCPM3Config
MINICPM3 = ModelFamily(
    architectures=("MiniCPM3ForCausalLM",),
    gguf_arch="minicpm3",
    defaults={"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    keys={
        "vocab_size": integer("vocab_size"),
        "attention.q_lora_rank": integer("q_lora_rank"),
        "attention.kv_lora_rank": integer("kv_lora_rank"),
        "attention.key_length": lambda hparams: (
            hparams.integer("qk_nope_head_dim") + hparams.integer("qk_rope_head_dim")
        ),
        "attention.value_length": absent,
        "rope.dimension_count": integer("qk_rope_head_dim"),
        "rope.freq_base": other_theta(10000.0),
    },
    # llama.cpp has the scales of the one model in its code
    requires={"scale_emb": (None, 12), "scale_depth": (None, 1.4), "dim_model_base": (None, 256)},
    ignored=("head_dim", "qk_head_dim", "v_head_dim"),
)
