"""AWQ in its GEMM layout: words of eight outputs in an order of their own, a scale and a zero point for each group.

Source: AutoAWQ, awq/utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.quantized.parts import Infos, Parts, by_matrix, matrix, misfit, need, runs, setting, unpacked
from convert.stored import raw_rows, stored
from models.errors import UnsupportedError
from models.text import printable
from models.weights import Index, Weights

_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Which four bits of a word hold each of its eight outputs."""


def decode(infos: Infos, settings: Mapping[str, Any]) -> dict[str, Weights]:
    """`NAME.qweight` and what is beside it to `NAME.weight`. Raises TensorError, UnsupportedError."""
    version = str(settings.get("version", "gemm")).lower()
    if version != "gemm":
        raise UnsupportedError(f"an AWQ checkpoint of version {printable(version, 20)!r} is not decoded, only gemm")
    setting(settings, "bits", (4,), settings.get("w_bit", 4))
    group = setting(settings, "group_size", range(-1, 1 << 20), settings.get("q_group_size", 128))
    parts, result = by_matrix(infos, (".qweight", ".qzeros", ".scales"), ".qweight")
    for name, found in parts.items():
        result[f"{name}.weight"] = _matrix(name, found, group)
    return result


def _matrix(name: str, parts: Parts, group: int) -> Weights:
    words = need(parts, name, ".qweight", "I32", dims=2)
    zeros = need(parts, name, ".qzeros", "I32", dims=2)
    scales = need(parts, name, ".scales", "F16", "BF16", "F32", dims=2)
    n_in, n_out = words.shape[0], words.shape[1] * 8
    size = group if group > 0 else n_in
    n_groups = -(-n_in // size)
    if scales.shape != (n_groups, n_out) or zeros.shape != (n_groups, n_out // 8):
        raise misfit(scales, f"scales {list(scales.shape)}, zero points {list(zeros.shape)} of {n_in} x {n_out}")
    factors = stored(scales)

    def outputs(packed: NDArray[Any]) -> NDArray[np.int32]:
        codes = unpacked(packed, 4, axis=1).reshape(len(packed), -1, 8)
        return codes[:, :, _PLACES].reshape(len(packed), -1)

    def read(rows: Index, columns: slice) -> NDArray[np.float32]:
        low, high = runs(rows)
        word, end = low // 8, -(-high // 8)
        keep = slice(low - word * 8, high - word * 8)
        inputs = np.arange(columns.start, columns.stop)
        codes = outputs(raw_rows(words, inputs, slice(word, end)))[:, keep]
        own, places = np.unique(inputs // size, return_inverse=True)
        points = outputs(raw_rows(zeros, own, slice(word, end)))[:, keep]
        values = (codes - points[places]).astype(np.float32) * factors.read(own, slice(low, high))[places]
        return np.ascontiguousarray(values.T[rows - low])

    return matrix(words, f"{name}.weight", (n_out, n_in), read)
