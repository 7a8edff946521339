"""GGUF files of any size as headers only: metadata, tensor infos, and a hole in place of the tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import gguf
import numpy as np

from models.gguf_file import read_gguf

VOCABULARY = 512


def write_header(
    path: Path,
    *,
    blocks: int,
    width: int,
    feed_forward: int,
    heads: int,
    kv_heads: int,
    experts: int = 0,
    experts_used: int = 2,
    context: int = 131_072,
    vocabulary: int = VOCABULARY,
    architecture: Literal["llama"] = "llama",
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q4_K,
) -> Path:
    """A llama, or with `experts` a mixture of them. The matrices are of the type `quantization`, the rest F32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(blocks)
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(experts_used)
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"t{index}" for index in range(vocabulary - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (vocabulary - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    total = 0

    def tensor(name: str, *shape: int) -> None:
        nonlocal total
        kind = quantization if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = int(np.prod(shape)) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        total += -(-nbytes // 32) * 32

    kv_width = width // heads * kv_heads
    tensor("token_embd.weight", vocabulary, width)
    tensor("output.weight", vocabulary, width)
    tensor("output_norm.weight", width)
    for index in range(blocks):
        at = f"blk.{index}"
        for part, rows in (("attn_q", width), ("attn_k", kv_width), ("attn_v", kv_width), ("attn_output", width)):
            tensor(f"{at}.{part}.weight", rows, width)
        for norm in ("attn_norm", "ffn_norm"):
            tensor(f"{at}.{norm}.weight", width)
        suffix, of = ("_exps", (experts,)) if experts else ("", ())
        if experts:
            tensor(f"{at}.ffn_gate_inp.weight", experts, width)
        tensor(f"{at}.ffn_gate{suffix}.weight", *of, feed_forward, width)
        tensor(f"{at}.ffn_up{suffix}.weight", *of, feed_forward, width)
        tensor(f"{at}.ffn_down{suffix}.weight", *of, width, feed_forward)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = -(-path.stat().st_size // 32) * 32
    with path.open("r+b") as file:
        file.truncate(start + total)
    read_gguf(path)  # it is one
    return path
