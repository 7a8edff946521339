"""GPTQ: words of small integers down the columns, a scale and a zero point for each group of inputs.

Source: AutoGPTQ and GPTQModel, nn_modules/qlinear. The older format stores zero points less one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.quantized.compressed import stored_integers
from convert.quantized.parts import Infos, Parts, by_matrix, matrix, misfit, need, runs, setting, unpacked
from convert.stored import raw_rows, stored
from models.weights import Index, Weights

_ENDINGS = (".qweight", ".qzeros", ".scales", ".g_idx")


def decode(infos: Infos, settings: Mapping[str, Any]) -> dict[str, Weights]:
    """`NAME.qweight` and what is beside it to `NAME.weight`. Raises TensorError, UnsupportedError."""
    bits = setting(settings, "bits", (2, 4, 8))
    group = setting(settings, "group_size", range(-1, 1 << 20), -1)
    less_one = 1 if str(settings.get("checkpoint_format") or "gptq") == "gptq" else 0
    parts, result = by_matrix(infos, _ENDINGS, ".qweight")
    for name, found in parts.items():
        result[f"{name}.weight"] = _matrix(name, found, bits, group, less_one)
    return result


def _matrix(name: str, parts: Parts, bits: int, group: int, less_one: int) -> Weights:
    words = need(parts, name, ".qweight", "I32", dims=2)
    zeros = need(parts, name, ".qzeros", "I32", dims=2)
    scales = need(parts, name, ".scales", "F16", "BF16", "F32", dims=2)
    per_word = 32 // bits
    n_in, n_out = words.shape[0] * per_word, words.shape[1]
    n_groups = scales.shape[0]
    if scales.shape != (n_groups, n_out) or zeros.shape != (n_groups, -(-n_out // per_word)):
        raise misfit(scales, f"scales {list(scales.shape)} and zero points {list(zeros.shape)} of {n_out} outputs")
    if ".g_idx" in parts:
        order = need(parts, name, ".g_idx", "I32", "I64", dims=1)
        groups = stored_integers(order).reshape(-1).astype(np.int64)
    else:
        groups = np.arange(n_in) // (group if group > 0 else n_in)
    if groups.shape != (n_in,) or groups.max() >= n_groups:
        raise misfit(words, f"{n_in} inputs in {n_groups} groups")
    factors = stored(scales)

    def read(rows: Index, columns: slice) -> NDArray[np.float32]:
        low, high = runs(rows)
        first = columns.start // per_word
        down = np.arange(first, -(-columns.stop // per_word))
        codes = unpacked(raw_rows(words, down, slice(low, high)), bits, axis=0)
        codes = codes[columns.start - first * per_word : columns.stop - first * per_word]
        own, places = np.unique(groups[columns], return_inverse=True)
        word = low // per_word
        points = unpacked(raw_rows(zeros, own, slice(word, -(-high // per_word))), bits, axis=1)
        points = points[:, low - word * per_word : high - word * per_word]
        if less_one:
            points = points + 1
        values = factors.read(own, slice(low, high))[places] * (codes - points[places]).astype(np.float32)
        return np.ascontiguousarray(values.T[rows - low])

    return matrix(words, f"{name}.weight", (n_out, n_in), read)
