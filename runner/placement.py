"""Which layers go to a GPU and why, as a value that can be printed.

The bytes are an estimate: those of the tensors are exact, the KV cache is reckoned from the header as if every
layer had full attention, and the compute buffers are a reserve. A load that fails for memory all the same is
tried again with fewer layers (`fewer_layers`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from models.gguf_file import GgufFile, LazyArray
from models.text import human_bytes
from runner.devices import Device

MEBIBYTE = 1 << 20
RESERVE = 384 * MEBIBYTE
"""Kept free on the devices for compute buffers and what the driver itself takes, at least."""
RESERVE_SHARE = 0.05
"""The same as a share of what is free."""
KV_TYPES: Mapping[str, tuple[int, float]] = {
    "f32": (0, 4.0),
    "f16": (1, 2.0),
    "bf16": (30, 2.0),
    "q8_0": (8, 34 / 32),
    "q5_1": (7, 24 / 32),
    "q5_0": (6, 22 / 32),
    "q4_1": (3, 20 / 32),
    "q4_0": (2, 18 / 32),
    "iq4_nl": (20, 18 / 32),
}
"""What the numbers of a KV cache can be: ggml's number for the type (ggml.h), and the bytes that each takes."""
_BLOCK = re.compile(r"blk\.(\d{1,5})\.")

GpuLayers = int | Literal["auto", "all"]


@dataclass(frozen=True)
class Placement:
    """Where the layers go. Layers are counted as llama.cpp does: every block, and the output as one more.

    llama.cpp fills a GPU from the end: `gpu_layers` of 12 are the output and the last 11 blocks.
    """

    gpu_layers: int
    n_layers: int
    devices: tuple[str, ...]
    needed: int
    """Bytes that the layers on the GPU take, as estimated."""
    reason: str

    def __str__(self) -> str:
        where = "+".join(self.devices) if self.gpu_layers else "CPU"
        return f"{self.gpu_layers}/{self.n_layers} layers on {where}: {self.reason}"


def block_count(gguf: GgufFile) -> int:
    """Blocks of the model: what the header says, else the highest number in a tensor's name."""
    named = [int(match[1]) for tensor in gguf.tensors if (match := _BLOCK.match(tensor.name))]
    found = max(named, default=-1) + 1
    said = gguf.integer(f"{gguf.architecture}.block_count")
    return said if said is not None and 0 < said <= found else found


def kv_bytes_per_token(gguf: GgufFile, kv_types: tuple[str, str] = ("f16", "f16")) -> list[int]:
    """Bytes of the KV cache that each block takes for one token, were its attention full."""
    arch = gguf.architecture
    blocks = block_count(gguf)
    heads = _per_block(gguf, f"{arch}.attention.head_count", blocks)
    kv_heads = _per_block(gguf, f"{arch}.attention.head_count_kv", blocks) or heads
    width = gguf.integer(f"{arch}.embedding_length") or 0
    most = max(heads, default=0)
    head_width = width // most if most else 0
    key = gguf.integer(f"{arch}.attention.key_length") or head_width
    value = gguf.integer(f"{arch}.attention.value_length") or head_width
    bytes_k, bytes_v = (KV_TYPES[kind][1] for kind in kv_types)
    each = key * bytes_k + value * bytes_v
    return [int(n * each) for n in kv_heads or [0] * blocks]


def _per_block(gguf: GgufFile, key: str, blocks: int) -> list[int]:
    found = gguf.metadata.get(key)
    if isinstance(found, LazyArray):
        values = [max(value, 0) if isinstance(value, int) else 0 for value in found[:blocks]]
        return values + [0] * (blocks - len(values))
    return [max(found, 0)] * blocks if isinstance(found, int) else []


def layer_bytes(gguf: GgufFile, n_ctx: int, kv_types: tuple[str, str] = ("f16", "f16")) -> list[int]:
    """Bytes of each layer that can be placed, weights and KV cache: the blocks in order, then the output."""
    kv = kv_bytes_per_token(gguf, kv_types)
    blocks = [n_ctx * per_token for per_token in kv]
    output = embedding = 0
    for tensor in gguf.tensors:
        match = _BLOCK.match(tensor.name)
        if match and int(match[1]) < len(blocks):
            blocks[int(match[1])] += tensor.nbytes
        elif tensor.name.startswith("output"):
            output += tensor.nbytes
        elif tensor.name == "token_embd.weight":
            embedding = tensor.nbytes
    tied = not any(tensor.name == "output.weight" for tensor in gguf.tensors)
    # A tied embedding is held a second time on the device that computes the output.
    return [*blocks, output + (embedding if tied else 0)]


def place(
    gguf: GgufFile,
    *,
    n_ctx: int,
    asked: GpuLayers,
    vram: int | None,
    available: Sequence[Device],
    kv_types: tuple[str, str] = ("f16", "f16"),
) -> Placement:
    """Decide how many layers the devices in `available` take. `vram` caps the bytes used on them.

    `n_ctx` in tokens. With "auto" all layers go there if they fit, else as many as do.
    """
    costs = layer_bytes(gguf, n_ctx, kv_types)
    names = tuple(device.name for device in available)

    def placed(count: int, reason: str) -> Placement:
        return Placement(count, len(costs), names, sum(costs[len(costs) - count :]), reason)

    if not available:
        return placed(0, "there is no GPU to place them on")
    if asked == "all":
        return placed(len(costs), "all were asked for")
    if asked != "auto":
        return placed(min(asked, len(costs)), "as asked for")
    free = sum(device.free for device in available)
    budget = free if vram is None else min(free, vram)
    budget -= max(RESERVE, int(budget * RESERVE_SHARE))
    count, total = 0, 0
    for cost in reversed(costs):
        if total + cost > budget:
            break
        total += cost
        count += 1
    limit = "free" if vram is None or free <= vram else "allowed"
    room = human_bytes(min(free, vram) if vram is not None else free)
    if count == len(costs):
        return placed(count, f"all fit the {room} {limit}")
    return placed(count, f"as many as fit the {room} {limit}")


def fewer_layers(count: int) -> Iterator[int]:
    """What to try after a load with `count` layers on the GPU failed for memory, down to none."""
    tried = {count}
    for share in (0.75, 0.5, 0.25):
        fewer = int(count * share)
        if 0 < fewer < count and fewer not in tried:
            tried.add(fewer)
            yield fewer
    if count > 0:
        yield 0
