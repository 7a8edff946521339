"""The bytes of a GGUF header: metadata and tensor infos. Format: ggml/include/gguf.h.

gguf's own writer packs a vocabulary of 151,000 tokens element by element, which takes longer than all of this file;
its `GGUFWriter` still collects the metadata, since its methods know the keys and their types.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from gguf.constants import GGUFValueType

ALIGNMENT = 32

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}


class TypedValue(Protocol):
    """gguf's `GGUFValue`."""

    value: Any
    type: GGUFValueType


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header. `shape` in GGUF order, row length first; sizes in bytes."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    nbytes: int


def padded(nbytes: int) -> int:
    """Rounded up to where the next tensor may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def header_bytes(metadata: Mapping[str, TypedValue | bytes], tensors: Sequence[TensorEntry]) -> bytes:
    """Everything before the tensor data, padded to where it begins.

    Metadata in bytes is a key with its type and value, as another file has it. Offsets follow the order of `tensors`.
    Raises struct.error for a value that its type cannot hold.
    """
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, entry in metadata.items():
        parts += [entry] if isinstance(entry, bytes) else [_string(key), struct.pack("<I", entry.type), _value(entry)]
    offset = 0
    for tensor in tensors:
        n_dims = len(tensor.shape)
        parts.append(_string(tensor.name))
        parts.append(struct.pack(f"<I{n_dims}QIQ", n_dims, *tensor.shape, tensor.type_id, offset))
        offset += padded(tensor.nbytes)
    header = b"".join(parts)
    return header.ljust(padded(len(header)), b"\0")


def _string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _value(entry: TypedValue) -> bytes:
    if entry.type == GGUFValueType.STRING:
        return _string(entry.value)
    if entry.type == GGUFValueType.ARRAY:
        return _array(entry.value)
    return struct.pack("<" + _SCALARS[entry.type], entry.value)


def _array(items: Sequence[Any]) -> bytes:
    first = items[0] if items else 0
    prefix = "<IQ"
    if isinstance(items, bytes):
        return struct.pack(prefix, GGUFValueType.UINT8, len(items)) + items
    if isinstance(first, (str, bytes)):
        data = [item.encode() if isinstance(item, str) else item for item in items]
        # 300,000 strings of a few lengths: each length is packed once
        lengths = {n: struct.pack("<Q", n) for n in set(map(len, data))}
        strings = b"".join([part for item in data for part in (lengths[len(item)], item)])
        return struct.pack(prefix, GGUFValueType.STRING, len(items)) + strings
    if isinstance(first, bool):
        return struct.pack(prefix, GGUFValueType.BOOL, len(items)) + bytes(items)
    if isinstance(first, float):
        return struct.pack(prefix, GGUFValueType.FLOAT32, len(items)) + np.asarray(items, "<f4").tobytes()
    return struct.pack(prefix, GGUFValueType.INT32, len(items)) + np.asarray(items, "<i4").tobytes()
