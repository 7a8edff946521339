"""bitsandbytes: NF4 and FP4 in blocks, their scales perhaps quantized again; LLM.int8.

Source: bitsandbytes, functional.py `QuantState.from_dict`, `dequantize_4bit`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.quantized.compressed import stored_integers
from convert.quantized.parts import Infos, Parts, by_matrix, matrix, misfit, need
from convert.stored import raw_rows, stored
from models.errors import TensorError
from models.rope import number_of
from models.weights import Index, Weights

_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_ENDINGS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *_STATES)
_INT8 = ("weight", "SCB", "weight_format")


def decode(infos: Infos, settings: Mapping[str, Any]) -> dict[str, Weights]:
    """Raises TensorError."""
    parts, rest = by_matrix(infos, _ENDINGS, ".absmax")
    result = {name: _four_bits(name, found) for name, found in parts.items()}
    eight = {name.removesuffix("SCB") for name in infos if name.endswith(".SCB")}
    for name in eight:
        result[f"{name}weight"] = _eight_bits(
            name, {part: infos[name + part] for part in _INT8 if name + part in infos}
        )
    used = {name + part for name in eight for part in _INT8}
    return {**{name: weights for name, weights in rest.items() if name not in used}, **result}


def _eight_bits(name: str, parts: Parts) -> Weights:
    codes = need(parts, name, "weight", "I8", dims=2)
    absmax = need(parts, name, "SCB", "F32", dims=1)
    if absmax.shape != codes.shape[:1]:
        raise misfit(absmax, f"{absmax.shape[0]} scales of {codes.shape[0]} rows")
    factors = stored(absmax)

    def read(rows: Index, columns: slice) -> NDArray[np.float32]:
        values = raw_rows(codes, rows, columns).view(np.int8).astype(np.float32)
        return values * (factors.read(rows, slice(0, 1)) / np.float32(127))

    return matrix(codes, f"{name}weight", codes.shape, read)


def _state(name: str, parts: Parts) -> Mapping[str, Any]:
    ending = next((end for end in _STATES if end in parts), _STATES[0])
    info = need(parts, name, ending, "U8", dims=1)
    try:
        state = json.loads(stored_integers(info).astype(np.uint8).tobytes())
    except (ValueError, RecursionError) as error:
        raise TensorError(f"tensor {info.name[:200]!r} does not hold a JSON object", tensor=info.name) from error
    if not isinstance(state, dict):
        raise TensorError(f"tensor {info.name[:200]!r} does not hold a JSON object", tensor=info.name)
    return state


def _four_bits(name: str, parts: Parts) -> Weights:
    state = _state(name, parts)
    codes = need(parts, name, "", "U8")
    shape, size = state.get("shape"), state.get("blocksize")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and 0 < n < 1 << 40 for n in shape):
        raise misfit(codes, "its state names no shape")
    if type(size) is not int or not 2 <= size <= 1 << 20 or size % 2:
        raise misfit(codes, "its state names no size of blocks")
    n = math.prod(shape)
    n_blocks = -(-n // size)
    if math.prod(codes.shape) != -(-n // 2):
        raise misfit(codes, f"{math.prod(codes.shape)} bytes for {n} weights")
    table = stored(need(parts, name, ".quant_map", "F32", dims=1)).values()
    if table.shape != (16,):
        raise misfit(parts[".quant_map"], "it has not 16 values")
    absmax = _absmax(name, parts, state, n_blocks)
    row_length = shape[-1] if len(shape) > 1 else 1
    bytes_of = _flat_bytes(codes)

    def read(rows: Index, columns: slice) -> NDArray[np.float32]:
        elements = (rows * row_length)[:, None] + np.arange(columns.start, columns.stop)
        own, places = np.unique(elements // 2, return_inverse=True)
        pairs = bytes_of(own)[places.reshape(elements.shape)]
        nibbles = np.where(elements % 2 == 0, pairs >> 4, pairs & 15)
        blocks, at = np.unique(elements // size, return_inverse=True)
        return np.asarray(table[nibbles] * absmax(blocks)[at.reshape(elements.shape)], np.float32)

    return matrix(codes, name, tuple(shape), read)


def _flat_bytes(info: Any) -> Any:
    """Bytes by their number, whatever shape they are stored in."""
    width = info.shape[-1] if len(info.shape) > 1 else 1
    if width == 1:
        return lambda numbers: raw_rows(info, numbers, slice(0, 1))[:, 0]

    def read(numbers: Index) -> NDArray[Any]:
        own, places = np.unique(numbers // width, return_inverse=True)
        return raw_rows(info, own, slice(0, width))[places, numbers % width]

    return read


def _absmax(name: str, parts: Parts, state: Mapping[str, Any], n_blocks: int) -> Any:
    """The scale of blocks by their numbers."""
    info = need(parts, name, ".absmax", "F32", "U8", dims=1)
    if info.shape != (n_blocks,):
        raise misfit(info, f"{info.shape[0]} scales of {n_blocks} blocks")
    if info.dtype == "F32":
        plain = stored(info)
        return lambda blocks: plain.read(blocks, slice(0, 1))[:, 0]
    size = state.get("nested_blocksize")
    if type(size) is not int or not 0 < size <= 1 << 20:
        raise misfit(info, "its state names no size of nested blocks")
    offset = np.float32(number_of("nested_offset", state.get("nested_offset")))
    table = stored(need(parts, name, ".nested_quant_map", "F32", dims=1)).values()
    outer_info = need(parts, name, ".nested_absmax", "F32", dims=1)
    if table.shape != (256,) or outer_info.shape != (-(-n_blocks // size),):
        raise misfit(outer_info, f"{outer_info.shape[0]} scales of {n_blocks} scales in blocks of {size}")
    outer = stored(outer_info)

    def nested(blocks: Index) -> NDArray[np.float32]:
        codes = raw_rows(info, blocks, slice(0, 1))[:, 0]
        own, places = np.unique(blocks // size, return_inverse=True)
        return np.asarray(table[codes] * outer.read(own, slice(0, 1))[places, 0] + offset, np.float32)

    return nested
