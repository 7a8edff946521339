"""compressed-tensors: FP8 and int8 as they are, integers of 4 or 8 bits packed into words.

Source: compressed-tensors, compressors/quantized_compressors/pack_quantized.py `unpack_from_int32`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.quantized.fp8 import scaled
from convert.quantized.parts import Infos, Parts, by_matrix, matrix, misfit, need, setting, unpacked
from convert.stored import raw_rows, stored
from models.errors import UnsupportedError
from models.text import printable
from models.weights import Index, Weights

_UNUSED = (".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".k_scale", ".v_scale")
_PACKED = ("_packed", "_scale", "_zero_point", "_shape", "_g_idx")


def decode(infos: Infos, settings: Mapping[str, Any]) -> dict[str, Weights]:
    """Raises TensorError, UnsupportedError."""
    form = str(settings.get("format"))
    infos = {name: info for name, info in infos.items() if not name.endswith(_UNUSED)}
    how = _weights_of(settings)
    if form == "pack-quantized":
        parts, result = by_matrix(infos, _PACKED, "_packed")
        for name, found in parts.items():
            result[name] = _packed(name, found, how)
        return result
    if form not in ("float-quantized", "int-quantized", "naive-quantized"):
        raise UnsupportedError(
            f"the checkpoint is compressed as {printable(form, 40)!r}, which is not decoded",
            hint="Decoded are pack-quantized, int-quantized and float-quantized.",
        )
    parts, result = by_matrix(infos, ("", "_scale", "_zero_point"), "_scale")
    for name, found in parts.items():
        weight, scale = need(found, name, "", "F8_E4M3", "F8_E5M2", "I8"), need(found, name, "_scale")
        if "_zero_point" in found and stored_integers(found["_zero_point"]).any():
            raise UnsupportedError(f"{printable(name)!r} has zero points beside codes of a byte, which is not decoded")
        result[name] = scaled(weight, scale, how.get("block_structure"))
    return result


def stored_integers(info: Any) -> NDArray[Any]:
    """A small tensor of integers or numbers, whole."""
    rows = np.arange(max(1, int(np.prod(info.shape[:-1])) if len(info.shape) > 1 else int(np.prod(info.shape))))
    width = info.shape[-1] if len(info.shape) > 1 else 1
    return raw_rows(info, rows, slice(0, width))


def _weights_of(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    groups = settings.get("config_groups")
    found = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    schemes: list[Mapping[str, Any]] = [s for group in found if isinstance(s := group.get("weights"), Mapping)]
    if not schemes or any(scheme != schemes[0] for scheme in schemes):
        raise UnsupportedError("config.json: quantization_config has no single scheme for all weights")
    return schemes[0]


def _packed(name: str, parts: Parts, how: Mapping[str, Any]) -> Weights:
    bits = setting(how, "num_bits", (4, 8))
    words = need(parts, name, "_packed", "I32", dims=2)
    scales = need(parts, name, "_scale", "F32", "F16", "BF16", dims=2)
    n_rows, n_words = words.shape
    per_word = 32 // bits
    n_columns = n_words * per_word
    if "_shape" in parts:
        shape = need(parts, name, "_shape", "I64", "I32", dims=1)
        sizes = stored_integers(shape).astype(np.int64).reshape(-1).tolist()
        if len(sizes) != 2 or sizes[0] != n_rows or not n_columns - per_word < sizes[1] <= n_columns:
            raise misfit(words, f"{sizes} in words {list(words.shape)}")
        n_columns = sizes[1]
    group = how.get("group_size")
    size = setting(how, "group_size", range(1, 1 << 20)) if group not in (None, -1) else n_columns
    if scales.shape != (n_rows, -(-n_columns // size)):
        raise misfit(scales, f"scales {list(scales.shape)} of {n_rows} x {n_columns} in groups of {size}")
    groups = np.arange(n_columns) // size
    if "_g_idx" in parts:
        order = need(parts, name, "_g_idx", "I32", dims=1)
        given = stored_integers(order).view(np.int32).reshape(-1)
        if given.min() >= 0:  # else it is not in use
            if given.shape != (n_columns,) or given.max() >= scales.shape[1]:
                raise misfit(order, "it names groups that are not there")
            groups = given.astype(np.int64)
    zeros = need(parts, name, "_zero_point", "I32", dims=2) if "_zero_point" in parts else None
    if zeros is not None and zeros.shape != (-(-n_rows // per_word), scales.shape[1]):
        raise misfit(zeros, f"zero points {list(zeros.shape)} of scales {list(scales.shape)}")
    factors = stored(scales)

    def read(rows: Index, columns: slice) -> NDArray[np.float32]:
        first = columns.start // per_word
        codes = unpacked(raw_rows(words, rows, slice(first, -(-columns.stop // per_word))), bits, axis=1)
        codes = codes[:, columns.start - first * per_word : columns.stop - first * per_word]
        own = groups[columns]
        low, high = int(own.min()), int(own.max()) + 1
        offsets: NDArray[Any] | int = 1 << (bits - 1)
        if zeros is not None:
            down, places = np.unique(rows // per_word, return_inverse=True)
            points = raw_rows(zeros, down, slice(low, high)).view(np.uint32)[places]
            shifts = (rows % per_word * bits).astype(np.uint32)
            offsets = ((points >> shifts[:, None]) & np.uint32((1 << bits) - 1)).astype(np.int32)[:, own - low]
        return (codes - offsets).astype(np.float32) * factors.read(rows, slice(low, high))[:, own - low]

    return matrix(words, name, (n_rows, n_columns), read)
