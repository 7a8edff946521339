"""How a family whose code lies beside its checkpoints is written here, and computed by `numpy_decoder`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints import Json, write_json, write_shards
from tests.family_checkpoints import VOCABULARY, Case, Tokenizer
from tests.numpy_decoder import Block, Decoder, logits

Arrays = dict[str, NDArray[Any]]
HIDDEN, WIDTH, HEADS, HEADS_KV, LAYERS, HEAD_DIM = 64, 128, 4, 2, 3, 16


@dataclass(frozen=True)
class Remote:
    """A family: its config, its tensors by name, and which of them make a block of the reference.

    shapes   tensors of a block, with {i} for its number, and those outside
    block    tensors by name, number -> the reference's block
    ends     tensors by name -> embedding, and the reference's end
    """

    config: Json
    decoder: Decoder
    shapes: Callable[[int], Mapping[str, tuple[int, ...]]]
    block: Callable[[Arrays, int], Block]
    ends: Callable[[Arrays], tuple[NDArray[Any], Block]]
    outside: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    layers: int = LAYERS


def _tensors(remote: Remote) -> Arrays:
    shapes: dict[str, tuple[int, ...]] = dict(remote.outside)
    for i in range(remote.layers):
        shapes |= remote.shapes(i)
    random = np.random.default_rng(3)
    arrays = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        is_norm = len(shape) == 1 and not name.endswith("bias")
        arrays[name] = values * 0.2 + 1 if is_norm else values * (0.3 if len(shape) == 1 else 0.12)
        arrays[name] = arrays[name].astype(np.float32)
    return arrays


def case(architecture: str, remote: Remote, tokenizer: Tokenizer) -> Case:
    def write(folder: Path) -> None:
        fields = {"architectures": [architecture], "torch_dtype": "float32"}
        write_json(folder / "config.json", fields | remote.config)
        write_shards(folder, _tensors(remote), 3)

    def compute(folder: Path, ids: Sequence[int]) -> NDArray[np.float32]:
        tensors = _tensors(remote)
        embedding, end = remote.ends(tensors)
        return logits(remote.decoder, ids, embedding, [remote.block(tensors, i) for i in range(remote.layers)], end)

    return Case(architecture, tokenizer=tokenizer, dtype="float32", write=write, logits=compute)


# Llama's names, which most share

PARTS = {
    "norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


def llama_shapes(i: int, heads_kv: int = HEADS_KV) -> dict[str, tuple[int, ...]]:
    at = f"model.layers.{i}"
    kv = heads_kv * HEAD_DIM
    sizes = {
        "norm": (HIDDEN,),
        "q": (HIDDEN, HIDDEN),
        "k": (kv, HIDDEN),
        "v": (kv, HIDDEN),
        "o": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "gate": (WIDTH, HIDDEN),
        "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
    }
    return {f"{at}.{PARTS[part]}": size for part, size in sizes.items()}


def llama_block(tensors: Arrays, i: int) -> Block:
    at = f"model.layers.{i}"
    return {part: tensors[f"{at}.{name}"] for part, name in PARTS.items() if f"{at}.{name}" in tensors}


def llama_ends(tensors: Arrays) -> tuple[NDArray[Any], Block]:
    end = {"norm": tensors["model.norm.weight"], "output": tensors["lm_head.weight"]}
    return tensors["model.embed_tokens.weight"], end


def outside(n_vocab: int) -> dict[str, tuple[int, ...]]:
    return {
        "model.embed_tokens.weight": (n_vocab, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (n_vocab, HIDDEN),
    }


SPM = VOCABULARY["sentencepiece"]
BPE = VOCABULARY["bpe"]
LLAMA_CONFIG: Json = {
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS_KV,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": SPM,
}


def without(config: Json, *names: str) -> Json:
    return {name: value for name, value in config.items() if name not in names}
