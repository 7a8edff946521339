"""Small Hugging Face checkpoints, made without torch: a tiny one of random weights, and SmolLM2 out of its GGUF.

Arrays stand for tensors: float32 for F32, float16 for F16, and uint16 for the bits of BF16.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray

from models.errors import HandmillError

Json = dict[str, Any]
Tensors = dict[str, NDArray[Any]]
Dtype = Literal["BF16", "F16", "F32"]

INDEX = "model.safetensors.index.json"
_DTYPES = {np.dtype(np.uint16): "BF16", np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}


def to_dtype(values: NDArray[np.float32], dtype: Dtype) -> NDArray[Any]:
    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def message_of(call: Callable[[], object]) -> str:
    """The message of the named error that `call` ends with; "" if it ends well. Any other error goes on."""
    try:
        call()
    except HandmillError as error:
        return str(error) or repr(error)
    return ""


quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""For properties of things that lie in files: `tmp_path` is written anew for each example."""


# Safetensors, by hand


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    header: Json = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    with path.open("wb") as file:
        file.write(_prefixed(header))
        for array in tensors.values():
            file.write(array.tobytes())


def edit_header(path: Path, change: Callable[[Json], Any]) -> None:
    """Let `change` alter the header of a shard; the data stays."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    change(header)
    path.write_bytes(_prefixed(header) + data[start:])


def _prefixed(header: Json) -> bytes:
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def write_shards(folder: Path, tensors: Tensors, n_shards: int) -> list[Path]:
    """The tensors over so many shards, with an index if there is more than one."""
    names = list(tensors)
    groups = [names[i * len(names) // n_shards : (i + 1) * len(names) // n_shards] for i in range(n_shards)]
    weight_map: dict[str, str] = {}
    paths = []
    for number, group in enumerate(groups, 1):
        file_name = f"model-{number:05}-of-{n_shards:05}.safetensors" if n_shards > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(group, file_name)
        write_safetensors(folder / file_name, {name: tensors[name] for name in group})
        paths.append(folder / file_name)
    if n_shards > 1:
        total = sum(array.nbytes for array in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return paths


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    write_json(path, value)


# A tiny model


def tiny_config(architecture: str = "LlamaForCausalLM", **fields: Any) -> Json:
    """A config of two blocks, as transformers 5 writes it; `fields` replace its own."""
    return {
        "architectures": [architecture],
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 128,
        "max_position_embeddings": 256,
        "model_type": "tiny",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "vocab_size": 320,
    } | fields


def tiny_tensors(config: Json, dtype: Dtype = "BF16") -> Tensors:
    """Random weights of the shapes that the config asks for, the same every time."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q_rows, kv_rows = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for block in range(config["num_hidden_layers"]):
        at = f"model.layers.{block}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.mlp.down_proj.weight": (hidden, intermediate),
            f"{at}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{at}.mlp.up_proj.weight": (intermediate, hidden),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attn.k_proj.weight": (kv_rows, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, q_rows),
            f"{at}.self_attn.q_proj.weight": (q_rows, hidden),
            f"{at}.self_attn.v_proj.weight": (kv_rows, hidden),
        }
        if config["architectures"] == ["Qwen2ForCausalLM"] or config.get("attention_bias"):
            rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
            shapes |= {f"{at}.self_attn.{part}_proj.bias": (n,) for part, n in rows.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    random = np.random.default_rng(1)
    tensors: Tensors = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=np.float32) * np.float32(0.1)
        tensors[name] = to_dtype(values + np.float32("norm" in name), dtype)
    return tensors


def tiny_checkpoint(
    folder: Path, architecture: str = "LlamaForCausalLM", *, dtype: Dtype = "BF16", shards: int = 2, **fields: Any
) -> Path:
    """A whole checkpoint of random weights, with the tokenizer of `write_tiny_tokenizer`."""
    folder.mkdir(parents=True)
    config = tiny_config(architecture, **fields)
    write_json(folder / "config.json", config)
    write_shards(folder, tiny_tensors(config, dtype), shards)
    write_tiny_tokenizer(folder)
    return folder


TINY_MERGES = ("▁ t", "h e", "▁t he", "i n", "▁ a", "e r", "o n", "▁a n", "▁an d", "in g", "▁ ▁", "▁▁ ▁▁")


def tiny_tokenizer() -> Json:
    """tokenizer.json as Llama 2 has it: BPE with byte fallback. 316 tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [merge.replace(" ", "") for merge in TINY_MERGES]
    pieces += ["▁", *map(chr, range(ord("a"), ord("z") + 1)), *"ABCDEF0123456789.,"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(i, text) for i, text in enumerate(pieces[:3])],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": list(TINY_MERGES),
        },
    }


def write_tiny_tokenizer(folder: Path) -> None:
    write_json(folder / "tokenizer.json", tiny_tokenizer())
    write_json(
        folder / "tokenizer_config.json",
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": "{{ messages }}"},
    )


def _added_token(i: int, content: str, **flags: bool) -> Json:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": i, "content": content, **plain, **flags}


def spell_as_transformers_4(folder: Path) -> Path:
    """The same checkpoint, spelt as transformers 4 wrote it."""

    def config(fields: Json) -> None:
        rope = fields.pop("rope_parameters")
        fields["rope_theta"] = rope.pop("rope_theta")
        fields["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        fields["torch_dtype"] = fields.pop("dtype")

    edit_json(folder / "config.json", config)
    template = folder / "chat_template.jinja"
    if template.exists():
        text = template.read_text(encoding="utf-8")
        edit_json(folder / "tokenizer_config.json", lambda fields: fields.update(chat_template=text))
        template.unlink()
    return folder


# SmolLM2, out of the starter's GGUF


def starter_checkpoint(folder: Path, starter: Path, *, blocks: int = 30, shards: int = 3) -> Path:
    """The first blocks of SmolLM2-135M-Instruct in bf16, as transformers 5 writes a checkpoint."""
    folder.mkdir(parents=True)
    reader = gguf.GGUFReader(starter)
    keys = _starter_keys(starter)
    config: Json = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": keys["llama.embedding_length"],
        "intermediate_size": keys["llama.feed_forward_length"],
        "is_llama_config": True,
        "max_position_embeddings": keys["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": keys["llama.attention.head_count"],
        "num_hidden_layers": blocks,
        "num_key_value_heads": keys["llama.attention.head_count_kv"],
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": keys["llama.vocab_size"],
    }
    write_json(folder / "config.json", config)
    _write_starter_tokenizer(folder, keys)
    write_shards(folder, _starter_tensors(reader, config), shards)
    return folder


def write_starter_tokenizer(folder: Path, starter: Path) -> None:
    """SmolLM2's tokenizer of 49,152 tokens: byte-level BPE, with a chat template."""
    _write_starter_tokenizer(folder, _starter_keys(starter))


@cache
def _starter_keys(starter: Path) -> Mapping[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(starter).fields.items()}


def _write_starter_tokenizer(folder: Path, keys: Mapping[str, Any]) -> None:
    tokenizer_config: Json = {
        "add_prefix_space": False,
        "bos_token": "<|im_start|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 8192,
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "chat_template.jinja").write_text(keys["tokenizer.chat_template"], encoding="utf-8")
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_json(folder / "tokenizer.json", _byte_level_tokenizer(keys))


_HF_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_down": "mlp.down_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "attn_k": "self_attn.k_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q": "self_attn.q_proj",
    "attn_v": "self_attn.v_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}


def _starter_tensors(reader: gguf.GGUFReader, config: Json) -> Tensors:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: Tensors = {}
    for tensor in reader.tensors:
        *block, part, _ = tensor.name.split(".")
        if block and int(block[1]) >= config["num_hidden_layers"]:
            continue
        rows = gguf.dequantize(tensor.data, tensor.tensor_type)
        if part in heads:  # from neighbouring pairs, as llama.cpp rotates them, to two halves
            pairs = rows.reshape(heads[part], -1, 2, rows.shape[-1])
            rows = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        tensors[f"{prefix}{_HF_PARTS[part]}.weight"] = to_dtype(rows, "BF16")
    return tensors


def _byte_level_tokenizer(keys: Mapping[str, Any]) -> Json:
    tokens: Sequence[str] = keys["tokenizer.ggml.tokens"]
    types: Sequence[int] = keys["tokenizer.ggml.token_type"]
    control = [i for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(i, tokens[i]) for i in control],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": list(keys["tokenizer.ggml.merges"]),
        },
    }
