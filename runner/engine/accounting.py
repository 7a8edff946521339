"""How many bytes a model and a context take on each device: what llama.cpp itself reckons, without taking them.

A model loaded with `no_alloc` has every tensor assigned and no memory behind it, and a context in it plans its graphs
as it would. To be called in a process of its own (`models.isolated`): a device that is away ends it.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from models import native
from models.errors import LoadError
from models.gguf_file import GgufFile
from models.gguf_parts import read_model
from runner import devices
from runner.engine.context_params import ContextOptions, context_params
from runner.engine.model_params import model_params
from runner.placement import CPU, Buffers, Split, read_layers, reckoned, used_tensors

_BREAKDOWN = "_Z26llama_get_memory_breakdownPK13llama_context"
_MOST_NODES = 256
_MIB = 1 << 20
_CACHE_LAYER = re.compile(r"llama_\w+(?:: |, )layer +\d+: dev = (\S+)$")
_CACHE = re.compile(r"llama_\w+: size = +([\d.]+) MiB \(")
_COMPUTE = re.compile(r"sched_reserve: +(\S+) compute buffer size = +([\d.]+) MiB$")
_SIZES = re.compile("|".join(pattern.pattern for pattern in (_CACHE_LAYER, _CACHE, _COMPUTE)))


def account(path: Path, split: Split, options: ContextOptions, repack: bool = True) -> dict[str, Buffers]:
    """Bytes on each device that is used, "CPU" among them, of the model at `path` placed as `split` says.

    Raises LoadError where llama.cpp cannot load it or make such a context.
    """
    lib = native.library()
    params = model_params(split)
    params.no_alloc = True
    params.load_mode = lib.LLAMA_LOAD_MODE_NONE
    params.use_extra_bufts = repack
    model = native.load_model(path, params)
    context = None
    try:
        if lib.llama_model_has_encoder(model) or not lib.llama_model_has_decoder(model):
            raise LoadError(f"{path.name} is no model that continues text (it has an encoder)", path=path)
        with native.capture_log(_SIZES) as sizes, native.capture_log() as log:
            context = lib.llama_init_from_model(model, context_params(options))
        if not context:
            said = "; ".join(log.problems())
            raise LoadError(f"llama.cpp cannot make a context of {options.n_ctx} tokens: {said}", path=path)
        return breakdown(context) or from_log(sizes.lines, read_model(path), split)
    finally:
        if context:
            lib.llama_free(context)
        lib.llama_model_free(model)


class _Node(ctypes.Structure):
    """What libstdc++ hangs into the tree of a `std::map<ggml_backend_buffer_type_t, llama_memory_breakdown_data>`."""


_Node._fields_ = [
    ("color", ctypes.c_int),
    ("parent", ctypes.POINTER(_Node)),
    ("left", ctypes.POINTER(_Node)),
    ("right", ctypes.POINTER(_Node)),
    ("buffer_type", ctypes.c_void_p),
    ("weights", ctypes.c_size_t),
    ("kv", ctypes.c_size_t),
    ("compute", ctypes.c_size_t),
]


class _Map(ctypes.Structure):
    """The map itself: an empty comparison, the head of the tree, whose parent is its root, and the number of nodes."""

    _fields_ = [
        ("comparison", ctypes.c_size_t),
        ("color", ctypes.c_size_t),
        ("root", ctypes.POINTER(_Node)),
        ("first", ctypes.POINTER(_Node)),
        ("last", ctypes.POINTER(_Node)),
        ("count", ctypes.c_size_t),
    ]


def breakdown(context: Any) -> dict[str, Buffers] | None:
    """What a context and its model take, as llama.cpp's own tools ask it; None where that cannot be read.

    The function is C++: its name and what it returns are those of GCC's library, as on Linux.
    """
    try:
        function = native.library()._lib[_BREAKDOWN] if sys.platform == "linux" else None
    except AttributeError:
        function = None
    if function is None:
        return None
    function.argtypes, function.restype = [ctypes.c_void_p], _Map
    found = function(context)
    nodes = list(_in_order(found.root)) if found.count <= _MOST_NODES else []
    if len(nodes) != found.count:  # another library's map
        return None
    totals: dict[str, Buffers] = defaultdict(Buffers)
    for node in nodes:
        name = devices.device_of_buffer_type(node.buffer_type)
        held = totals[name]
        totals[name] = Buffers(held.weights + node.weights, held.kv + node.kv, held.compute + node.compute)
    return dict(totals)


def _in_order(node: Any, depth: int = 0) -> Iterator[Any]:
    if node and depth < _MOST_NODES:
        yield from _in_order(node.contents.left, depth + 1)
        yield node.contents
        yield from _in_order(node.contents.right, depth + 1)


def from_log(lines: Iterable[str], gguf: GgufFile, split: Split) -> dict[str, Buffers]:
    """The same from what llama.cpp logs on every system: caches and compute buffers, rounded to 0.01 MiB.

    The log has no bytes of weights then: they are those of the tensors in the file.
    """
    layers = read_layers(gguf)
    weights = reckoned(layers, split, [0] * layers.count)
    weights[CPU] = sum(tensor.nbytes for tensor in used_tensors(gguf)) - sum(weights.values())
    if split.layers and split.layers[-1][1] and not any(t.name == "output.weight" for t in gguf.tensors):
        weights[CPU] += next((t.nbytes for t in gguf.tensors if t.name == "token_embd.weight"), 0)  # held twice
    names = {device.buffer_type: device.name for device in devices.devices()}
    kv: Counter[str] = Counter()
    compute: Counter[str] = Counter()
    cached: list[str] = []
    for line in lines:
        if layer := _CACHE_LAYER.search(line):
            cached.append(layer[1])
        elif size := _CACHE.search(line):  # of the layers named since the cache before it
            for name in cached:
                kv[name] += round(float(size[1]) * _MIB / len(cached))
            cached = []
        elif size := _COMPUTE.search(line):
            compute[names.get(size[1], CPU)] += round(float(size[2]) * _MIB)
    return {name: Buffers(weights.get(name, 0), kv[name], compute[name]) for name in {*weights, *kv, *compute}}
