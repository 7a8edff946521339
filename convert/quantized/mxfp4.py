"""MXFP4, gpt-oss's experts: 32 weights of four bits with one power of two.

Source: transformers, integrations/mxfp4.py `convert_moe_packed_tensors`; OCP Microscaling Formats, version 1.0. ggml
has the same blocks with the halves of a block in the two halves of its bytes, so they can also stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.quantized.parts import Infos, by_matrix, misfit, need
from convert.stored import raw_rows
from convert.tensor_info import TensorInfo
from models.weights import Index, Packed, Weights

_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_TABLE = np.concatenate([_VALUES, -_VALUES])
_BLOCK = 32


def decode(infos: Infos, settings: Mapping[str, Any]) -> dict[str, Weights]:
    """`NAME_blocks` [..., rows, blocks, 16] and `NAME_scales` to `NAME.weight` [..., rows, 32 * blocks]."""
    parts, result = by_matrix(infos, ("_blocks", "_scales"), "_blocks")
    for name, found in parts.items():
        codes, scales = need(found, name, "_blocks", "U8"), need(found, name, "_scales", "U8")
        if len(codes.shape) < 3 or codes.shape[-1] != _BLOCK // 2 or scales.shape != codes.shape[:-1]:
            raise misfit(codes, f"blocks {list(codes.shape)}, scales {list(scales.shape)}")
        result[f"{name}.weight"] = _matrix(f"{name}.weight", codes, scales)
    return result


def _matrix(name: str, codes: TensorInfo, scales: TensorInfo) -> Weights:
    *outer, n_blocks, _ = codes.shape

    def blocks_of(rows: Index, first: int, last: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Bytes [rows, blocks, 16] and exponents [rows, blocks]."""
        numbers = (rows * n_blocks)[:, None] + np.arange(first, last)
        halves = raw_rows(codes, numbers.reshape(-1), slice(0, _BLOCK // 2))
        return halves.reshape(*numbers.shape, -1), raw_rows(scales, rows, slice(first, last))

    def read(rows: Index, columns: slice) -> NDArray[np.float32]:
        first, last = columns.start // _BLOCK, -(-columns.stop // _BLOCK)
        halves, exponents = blocks_of(rows, first, last)
        nibbles = np.stack([halves & 15, halves >> 4], -1).reshape(*exponents.shape, _BLOCK)
        values = np.ldexp(_TABLE[nibbles], exponents.astype(np.int32)[..., None] - 127)
        whole = values.reshape(len(rows), -1)
        return np.ascontiguousarray(whole[:, columns.start - first * _BLOCK : columns.stop - first * _BLOCK])

    def packed(rows: Index) -> NDArray[np.uint8]:
        halves, exponents = blocks_of(rows, 0, n_blocks)
        # weights 2i and 2i + 1 share a byte here, weights i and i + 16 in ggml
        nibbles = np.stack([halves & 15, halves >> 4], -1).reshape(*exponents.shape, _BLOCK)
        together = nibbles[..., : _BLOCK // 2] | nibbles[..., _BLOCK // 2 :] << 4
        return np.concatenate([exponents[..., None], together], -1).reshape(-1).astype(np.uint8)

    return Weights((*outer, n_blocks * _BLOCK), None, name, codes.path.name, read, Packed("MXFP4", packed))
