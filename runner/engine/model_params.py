"""What llama.cpp is told about a model to load: the devices, the layers on each, the tensors that stay on the CPU."""

from __future__ import annotations

import ctypes
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from models import native
from runner import devices
from runner.placement import Split

_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(\w+)", re.ASCII)


class _Override(ctypes.Structure):
    """`llama_model_tensor_buft_override`: a regular expression, and the memory for the tensors that it finds."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


def model_params(split: Split) -> Any:
    """`llama_model_params` that put the model where `split` says. Raises LoadError where a device is gone."""
    lib = native.library()
    if not split.gpu_layers:
        return native.cpu_model_params()
    params = lib.llama_model_default_params()
    used = [(name, count) for name, count in split.layers if count]
    pointers = (ctypes.c_void_p * (len(used) + 1))(*(devices.pointer_of(name) for name, _ in used), None)
    # Given as shares, the counts come out exactly: llama.cpp divides the same whole numbers on both sides.
    shares = (ctypes.c_float * max(lib.llama_max_devices(), len(used)))(*(count for _, count in used))
    overrides = _overrides(split.on_cpu)
    params.devices = ctypes.cast(pointers, ctypes.c_void_p)
    params.tensor_split = shares
    params.n_gpu_layers = split.gpu_layers
    params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    params._keep_alive = pointers, shares, overrides  # llama.cpp reads them while it loads
    return params


def _overrides(names: Iterable[str]) -> Any:
    patterns = cpu_patterns(names)
    entries = (_Override * (len(patterns) + 1))()  # an empty one ends the list
    for entry, pattern in zip(entries, patterns, strict=False):
        entry.pattern, entry.buffer_type = pattern.encode(), devices.cpu_buffer_type()
    return entries


def cpu_patterns(names: Iterable[str]) -> list[str]:
    """Few regular expressions that find these tensors of blocks and no others.

    llama.cpp compiles each of them anew for each tensor: blocks that keep the same parts share one.
    """
    parts: dict[int, set[str]] = defaultdict(set)
    for name in names:
        if match := _TENSOR.fullmatch(name):
            parts[int(match[1])].add(rf"{match[2]}\.{match[3]}")
    blocks: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for block, kept in sorted(parts.items()):
        blocks[tuple(sorted(kept))].append(block)
    return [rf"^blk\.({'|'.join(map(str, numbers))})\.({'|'.join(kept)})$" for kept, numbers in blocks.items()]
