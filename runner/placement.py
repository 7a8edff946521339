"""Which layers go to which device and why, as a value that can be printed; and what a model's header says of bytes.

The bytes of a `Placement` are llama.cpp's own (`runner.planner`). Those that are reckoned here from the header only
say where to begin to ask.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from models.gguf_file import GgufFile, LazyArray, TensorInfo

MEBIBYTE = 1 << 20
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
DEFAULT_KV_TYPES = ("f16", "f16")
_BLOCK = re.compile(r"blk\.(\d{1,5})\.")
_EXPERTS = re.compile(r"blk\.\d{1,5}\.ffn_\w*_exps\.\w+", re.ASCII)
_FEED_FORWARD = re.compile(r"blk\.\d{1,5}\.ffn_(up|gate|down)\.weight", re.ASCII)

GpuLayers = int | Literal["auto", "all"]
CPU = "CPU"


@dataclass(frozen=True)
class Buffers:
    """Bytes that a model and its context take on one device."""

    weights: int = 0
    kv: int = 0
    compute: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute


@dataclass(frozen=True)
class Split:
    """What llama.cpp is told: how many layers each device takes, and which of their tensors stay on the CPU.

    Layers are counted as llama.cpp does: every block, and the output as one more. The devices take them in the order
    given, and together the last ones: 12 on one device are the output and the last 11 blocks.
    """

    layers: tuple[tuple[str, int], ...] = ()
    on_cpu: tuple[str, ...] = ()

    @property
    def gpu_layers(self) -> int:
        return sum(count for _, count in self.layers)

    def fewer(self, count: int) -> Split:
        """With `count` layers in all, each device in its share; what stays on the CPU of them still does."""
        taken, layers = 0, []
        for index in range(len(self.layers)):
            through = round(count * sum(n for _, n in self.layers[: index + 1]) / max(self.gpu_layers, 1))
            layers.append((self.layers[index][0], through - taken))
            taken = through
        return replace(self, layers=tuple(layers))


@dataclass(frozen=True)
class Settings:
    """What else decides how many bytes are needed: tokens of context, K and V of the cache, tokens at once."""

    n_ctx: int
    kv_types: tuple[str, str] = DEFAULT_KV_TYPES
    batch: int = 512


@dataclass(frozen=True)
class Placement:
    """Where the layers go, and why."""

    split: Split
    n_layers: int
    settings: Settings
    reason: str
    buffers: Mapping[str, Buffers] = field(default_factory=dict)
    """By device, "CPU" among them; empty where nobody asked llama.cpp."""
    notes: tuple[str, ...] = ()
    """What was reduced, one line each."""

    @property
    def gpu_layers(self) -> int:
        return self.split.gpu_layers

    @property
    def is_all(self) -> bool:
        """Whether nothing that could be elsewhere is on the CPU."""
        return self.gpu_layers == self.n_layers and not self.split.on_cpu

    def __str__(self) -> str:
        where = "+".join(name for name, count in self.split.layers if count) or CPU
        return f"{self.gpu_layers}/{self.n_layers} layers on {where}: {self.reason}"


@dataclass(frozen=True)
class Layers:
    """What a header says of each layer that can be placed: the blocks in order, then the output.

    weights   bytes of a layer's tensors
    movable   name and bytes of those that can stay on the CPU while attention goes elsewhere: a block's experts, or
              the matrices of its feed-forward part
    kv        bytes of the cache for one token, were every attention full
    experts   whether the model is a mixture of experts
    """

    weights: tuple[int, ...]
    movable: tuple[tuple[tuple[str, int], ...], ...]
    kv: tuple[int, ...]
    experts: bool

    @property
    def count(self) -> int:
        return len(self.weights)


def read_layers(gguf: GgufFile, kv_types: tuple[str, str] = DEFAULT_KV_TYPES) -> Layers:
    """The layers of a model."""
    kv = kv_bytes_per_token(gguf, kv_types)
    blocks, movable = [0] * len(kv), [[] for _ in kv]  # type: tuple[list[int], list[list[tuple[str, int]]]]
    output = embedding = 0
    used = used_tensors(gguf)
    experts = any(_EXPERTS.fullmatch(tensor.name) for tensor in used)
    can_stay = _EXPERTS if experts else _FEED_FORWARD
    for tensor in used:
        match = _BLOCK.match(tensor.name)
        if match and int(match[1]) < len(blocks):
            blocks[int(match[1])] += tensor.nbytes
            if can_stay.fullmatch(tensor.name):
                movable[int(match[1])].append((tensor.name, tensor.nbytes))
        elif tensor.name.startswith("output"):
            output += tensor.nbytes
        elif tensor.name == "token_embd.weight":
            embedding = tensor.nbytes
    tied = not any(tensor.name == "output.weight" for tensor in gguf.tensors)
    # A tied embedding is held a second time on the device that computes the output.
    weights = (*blocks, output + (embedding if tied else 0))
    return Layers(weights, (*map(tuple, movable), ()), (*kv, 0), experts)


def used_tensors(gguf: GgufFile) -> list[TensorInfo]:
    """Those that are loaded and computed with: not the blocks at the end that only predict further tokens."""
    last = block_count(gguf) - (gguf.integer(f"{gguf.architecture}.nextn_predict_layers") or 0)
    return [tensor for tensor in gguf.tensors if not (match := _BLOCK.match(tensor.name)) or int(match[1]) < last]


def block_count(gguf: GgufFile) -> int:
    """Blocks of the model: what the header says, else the highest number in a tensor's name."""
    named = [int(match[1]) for tensor in gguf.tensors if (match := _BLOCK.match(tensor.name))]
    found = max(named, default=-1) + 1
    said = gguf.integer(f"{gguf.architecture}.block_count")
    return said if said is not None and 0 < said <= found else found


def kv_bytes_per_token(gguf: GgufFile, kv_types: tuple[str, str] = DEFAULT_KV_TYPES) -> list[int]:
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
    extra = gguf.integer(f"{arch}.nextn_predict_layers") or 0
    return [int(n * each) * (block < blocks - extra) for block, n in enumerate(kv_heads or [0] * blocks)]


def _per_block(gguf: GgufFile, key: str, blocks: int) -> list[int]:
    found = gguf.metadata.get(key)
    if isinstance(found, LazyArray):
        values = [max(value, 0) if isinstance(value, int) else 0 for value in found[:blocks]]
        return values + [0] * (blocks - len(values))
    return [max(found, 0)] * blocks if isinstance(found, int) else []


def fill(costs: Sequence[float], room: Iterable[int]) -> list[int]:
    """How many layers each device takes: the first as many of the last ones as it has room for, and so on."""
    left, counts = list(costs), []
    for space in room:
        count, rest = 0, float(space)
        while left and left[-1] <= rest:
            rest -= left.pop()
            count += 1
        counts.append(count)
    return counts


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


def reckoned(layers: Layers, split: Split, kv: Sequence[float]) -> dict[str, int]:
    """Bytes of weights, and of a cache that takes `kv` bytes a layer, on each device that `split` names."""
    stays, index, found = set(split.on_cpu), layers.count - split.gpu_layers, {}
    for name, count in split.layers:
        inside = range(index, index + count)
        kept = sum(size for i in inside for tensor, size in layers.movable[i] if tensor in stays)
        found[name] = int(sum(layers.weights[i] + kv[i] for i in inside)) - kept
        index += count
    return found


def bytes_sent(gguf: GgufFile, *, last: bool) -> int:
    """Bytes that one token takes to another machine and back: the hidden state, or after the `last` layer the logits.

    Both are in F32.
    """
    width = gguf.integer(f"{gguf.architecture}.embedding_length") or 0
    rows = next((tensor.shape[-1] for tensor in gguf.tensors if tensor.name == "token_embd.weight"), 0)
    return 4 * (width + (rows if last else width))


def bytes_per_token(gguf: GgufFile, split: Split) -> dict[str, float]:
    """Bytes of weights that each device reads for one token: of experts those that are chosen, of an embedding a row.

    "CPU" is always among them.
    """
    tied = not any(tensor.name == "output.weight" for tensor in gguf.tensors)
    experts = gguf.integer(f"{gguf.architecture}.expert_count") or 1
    chosen = (gguf.integer(f"{gguf.architecture}.expert_used_count") or 1) / experts
    blocks = block_count(gguf)
    devices = [name for name, count in split.layers for _ in range(count)]
    on_device = dict(zip(range(blocks + 1 - len(devices), blocks + 1), devices, strict=True))
    stays, found = set(split.on_cpu), {CPU: 0.0} | dict.fromkeys(devices, 0.0)
    for tensor in used_tensors(gguf):
        match = _BLOCK.match(tensor.name)
        if match:
            layer = int(match[1])
        elif tensor.name.startswith("output") or (tied and tensor.name == "token_embd.weight"):
            layer = blocks
        elif tensor.name == "token_embd.weight":
            continue
        else:
            layer = -1
        name = CPU if tensor.name in stays else on_device.get(layer, CPU)
        found[name] += tensor.nbytes * (chosen if _EXPERTS.fullmatch(tensor.name) else 1)
    return found
