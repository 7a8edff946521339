"""Where a tensor of a checkpoint lies, whatever the format of its shard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DTYPE_BYTES = {
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    "F64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "BOOL": 1,
    "I8": 1,
    "I16": 2,
    "I32": 4,
    "I64": 8,
    "U8": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
}
"""Bytes of one element, by the names that safetensors gives to dtypes."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `shape` outermost first; `offset` of its first element in bytes of `path`.

    `strides`, in elements and never negative, is None for rows one after the other, as nearly always. A shape of no
    dimensions is one number; a size of 0 is no bytes. `nbytes` counts the elements, not what lies between them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None


def contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements lie one after the other, the last dimension fastest. Strides count elements."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return math.prod(shape) == 0
        expected *= size
    return True
