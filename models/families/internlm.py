"""InternLM 2 and 3, MiniCPM."""

from collections.abc import Iterable
from dataclasses import replace
from re import Match

from models.families import ModelFamily
from models.families import vocabulary as rules
from models.families.keys import COMMON, absent, integer, number, other_theta
from models.families.llama import LLAMA
from models.families.passes import each, interleave_halves, interleaved_rope, own_output
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
    requires={"bias": (None, False)},
    passes=(
        each(r"(.*\.attention)\.wqkv\.(weight|bias)", _by_group),
        own_output("model.tok_embeddings.weight", "output.weight"),
    ),
    vocabulary=rules.INTERNLM2,
)

# transformers, InternLM3Config: a llama with its own names for biases
INTERNLM3 = replace(
    LLAMA,
    architectures=("InternLM3ForCausalLM",),
    defaults={
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "head_dim": 128,
        "num_key_value_heads": 2,
    },
    vocabulary=rules.INTERNLM3,
)


def _residual_scale(hparams: Hparams) -> float:
    return float(hparams.number("scale_depth") / hparams.n_layers**0.5)


def _note(hparams: Hparams) -> str | None:
    sparse = hparams.get("sparse_config")
    if not isinstance(sparse, dict):
        return None
    dense = f"up to {sparse['dense_len']} tokens" if type(sparse.get("dense_len")) is int else "on short texts"
    return f"llama.cpp attends to every token where this model chooses some: equal {dense}"


# The code beside its checkpoints
MINICPM = ModelFamily(
    architectures=("MiniCPMForCausalLM",),
    gguf_arch="minicpm",
    defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "scale_emb": 1,
        "scale_depth": 1,
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
    ignored=("mup_denominator", "sparse_config"),  # of heads that predict further tokens; see the note
    note=_note,
)

# transformers, MiniCPM3Config
MINICPM3 = ModelFamily(
    architectures=("MiniCPM3ForCausalLM",),
    gguf_arch="minicpm3",
    defaults={
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
    # what a rope scaling changes are the rotated rows of a head alone
    aliases={"head_dim": "qk_rope_head_dim"},
    keys={
        "vocab_size": integer("vocab_size"),
        "rope.scaling.type": lambda hparams: (
            None if hparams.rope.type == "longrope" else COMMON["rope.scaling.type"](hparams)
        ),
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
    requires={
        "scale_emb": (None, 12, 12.0),
        "scale_depth": (None, 1.4),
        "dim_model_base": (None, 256),
        "v_head_dim": lambda hparams: (None, hparams.integer("hidden_size") // hparams.n_heads),
    },
    ignored=("head_dim", "qk_head_dim"),
)
