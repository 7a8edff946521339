"""FP8 with a scale for each tensor, row, or block of rows and columns: DeepSeek V3, Qwen3-FP8, FBGEMM, ModelOpt.

Source: transformers, integrations/finegrained_fp8.py. Values are the number of the code times the scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.quantized.parts import Infos, matrix, misfit
from convert.stored import raw_rows, stored
from convert.tensor_info import TensorInfo
from models.errors import UnsupportedError
from models.weights import Index, ReadRows, Weights

_SCALES = ("_scale_inv", "_scale")
# Of activations and caches, and ModelOpt's of other kinds: the weights do without.
_UNUSED = (".input_scale", ".activation_scale", "_activation_scale", ".input_scale_ub", ".k_scale", ".v_scale")


def decode(infos: Infos, settings: Mapping[str, Any]) -> dict[str, Weights]:
    """`NAME` and `NAME_scale_inv` (or `NAME_scale`) to `NAME`. Raises TensorError, UnsupportedError."""
    algorithm = str(settings.get("quant_algo", "FP8"))
    if "NVFP4" in algorithm or "MIXED" in algorithm:
        raise UnsupportedError(f"the checkpoint is quantized as {algorithm[:40]!r}, which is not decoded")
    block = settings.get("weight_block_size")
    scales = {
        name.removesuffix(end): (name, infos[name])
        for end in _SCALES
        for name in infos
        if name.endswith(end) and name.removesuffix(end) in infos and not name.endswith(_UNUSED)
    }
    taken = {name for name, _ in scales.values()}
    result: dict[str, Weights] = {}
    for name, info in infos.items():
        if name in scales:
            result[name] = scaled(info, scales[name][1], block)
        elif name not in taken and not name.endswith(_UNUSED):
            result[name] = stored(info)
    return result


def scaled(info: TensorInfo, scale: TensorInfo, block: object = None) -> Weights:
    """Codes of one byte, FP8 or a signed integer, times scales: one for all, for each row, or for each block."""
    if info.dtype not in _TABLES or not info.shape or 0 in info.shape:
        raise misfit(info, f"it is {info.dtype} {list(info.shape)}")
    table = _TABLES[info.dtype]
    factors = _factors(info, stored(scale), scale, block)

    def read(rows: Index, columns: slice) -> NDArray[np.float32]:
        values: NDArray[np.float32] = table[raw_rows(info, rows, columns)] * factors(rows, columns)
        return values

    return matrix(info, info.name, info.shape, read)


def _factors(info: TensorInfo, scale: Weights, stored_as: TensorInfo, block: object) -> ReadRows:
    """The scale of each element of a slab, or what numpy spreads over it."""
    if scale.n_weights == 1:
        one = scale.reshaped(1)
        return lambda rows, columns: one.read(np.zeros(1, np.int64), slice(0, 1))
    *outer, n_rows, n_columns = info.shape if len(info.shape) > 1 else (*info.shape, 1)
    n_matrices = int(np.prod(outer))
    if not isinstance(block, list):
        if scale.n_weights not in (n_matrices * n_rows, n_matrices):
            raise misfit(stored_as, f"scales {list(stored_as.shape)} of a matrix {list(info.shape)}")
        each, per_scale = scale.reshaped(scale.n_weights), n_matrices * n_rows // scale.n_weights
        return lambda rows, columns: each.read(rows // per_scale, slice(0, 1))
    if len(block) != 2 or not all(type(size) is int and 0 < size < 1 << 20 for size in block):
        raise UnsupportedError(f"config.json: quantization_config has the blocks {str(block)[:40]}")
    tall, wide = block
    high, broad = -(-n_rows // tall), -(-n_columns // wide)
    if scale.shape != (*outer, high, broad):
        raise misfit(stored_as, f"scales {list(stored_as.shape)} of a matrix {list(info.shape)} in blocks {block}")

    def of_blocks(rows: Index, columns: slice) -> NDArray[np.float32]:
        first, last = columns.start // wide, (columns.stop - 1) // wide + 1
        down = rows // n_rows * high + rows % n_rows // tall
        across = np.arange(columns.start, columns.stop) // wide - first
        own, places = np.unique(down, return_inverse=True)
        return scale.read(own, slice(first, last))[places][:, across]

    return of_blocks


def _e4m3() -> NDArray[np.float32]:
    """All codes of E4M3FN: no infinity, and the two highest are no number."""
    codes = np.arange(256)
    exponents, mantissas = (codes >> 3) & 15, codes & 7
    normal = (8 + mantissas) * 2.0 ** (exponents - 10)
    values = np.where(exponents == 0, mantissas * 2.0**-9, normal)
    values = np.where(codes & 127 == 127, np.nan, values)
    return np.where(codes & 128, -values, values).astype(np.float32)


def _e5m2() -> NDArray[np.float32]:
    """All codes of E5M2: the upper half of float16."""
    return (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)


_TABLES = {
    "F8_E4M3": _e4m3(),
    "F8_E5M2": _e5m2(),
    "I8": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32),
}
