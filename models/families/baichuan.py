"""Baichuan 1 and 2, XVERSE, Orion."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from models.families import ModelFamily
from models.families.keys import absent, fixed, head_dim, number, other_theta
from models.families.passes import change, interleaved_rope, own_output, split
from models.hparams import Hparams
from models.weights import Index, Weights


def _thirds(hparams: Hparams) -> list[tuple[str, int]]:
    width = hparams.integer("hidden_size")
    return [(rf"\1.{part}_proj.weight", width) for part in "qkv"]


def _context(hparams: Hparams) -> int:
    name = "max_position_embeddings"
    return hparams.integer(name if hparams.has(name) else "model_max_length")


_OUTPUT = own_output("model.embed_tokens.weight", "lm_head.weight")
_BAICHUAN_2 = 125696
"""Tokens of its vocabulary, by which everybody tells it from Baichuan 1: no field does."""


def _unit_rows(weights: Weights, hparams: Hparams) -> Weights:
    """Baichuan 2 multiplies with the directions of the rows of its output matrix, whatever their lengths."""
    if hparams.integer("vocab_size") != _BAICHUAN_2:
        return weights

    def read(rows: Index, columns: slice) -> NDArray[np.float32]:
        whole = weights.read(rows, slice(0, weights.row_length))
        lengths = np.maximum(np.linalg.norm(whole, axis=1, keepdims=True), 1e-12)
        return np.ascontiguousarray((whole / lengths)[:, columns], np.float32)

    return replace(weights, dtype=None, read=read)


# The code beside its checkpoints; llama.cpp tells the 13B models, whose attention fades with distance, by 40 blocks
BAICHUAN = ModelFamily(
    architectures=("BaichuanForCausalLM", "BaiChuanForCausalLM"),
    gguf_arch="baichuan",
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    keys={
        "context_length": _context,
        "attention.key_length": absent,
        "attention.value_length": absent,
        "tensor_data_layout": fixed("Meta AI original pth"),
        "rope.dimension_count": head_dim,
    },
    requires={"num_hidden_layers": (32, 40)},
    passes=(
        split(r"(.*\.self_attn)\.W_pack\.weight", _thirds),
        *interleaved_rope(),
        _OUTPUT,
        change(r"lm_head\.weight", _unit_rows),
    ),
    ignored=("position_embedding", "user_token_id", "assistant_token_id"),
)

# The code beside its checkpoints
XVERSE = replace(
    BAICHUAN,
    architectures=("XverseForCausalLM",),
    gguf_arch="xverse",
    requires={},
    passes=(*interleaved_rope(), _OUTPUT),
    ignored=("max_tokenizer_truncation",),
)

# The code beside its checkpoints; its norms subtract the mean, whatever the config calls them
ORION = ModelFamily(
    architectures=("OrionForCausalLM",),
    gguf_arch="orion",
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    keys={
        "attention.key_length": absent,
        "attention.value_length": absent,
        "attention.layer_norm_rms_epsilon": absent,
        "attention.layer_norm_epsilon": number("rms_norm_eps"),
        "rope.freq_base": other_theta(10000.0),
        "tensor_data_layout": fixed("Meta AI original pth"),
    },
    passes=(_OUTPUT,),
)
