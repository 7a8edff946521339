"""What the methods share: the tensors of one matrix by their endings, small integers packed into large ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.stored import stored
from convert.tensor_info import TensorInfo
from models.errors import TensorError, UnsupportedError
from models.text import printable
from models.weights import Index, ReadRows, Weights

Infos = Mapping[str, TensorInfo]
Parts = Mapping[str, TensorInfo]
"""Ending -> tensor, of one matrix."""


def by_matrix(infos: Infos, endings: tuple[str, ...], marks: str) -> tuple[dict[str, Parts], dict[str, Weights]]:
    """The parts of each matrix that has one with the ending `marks`, by what is before; and all other tensors."""
    names = [name.removesuffix(marks) for name in infos if name.endswith(marks)]
    parts: dict[str, Parts] = {
        name: {end: infos[name + end] for end in endings if name + end in infos} for name in names
    }
    taken = {name + end for name, found in parts.items() for end in found}
    return parts, {name: stored(info) for name, info in infos.items() if name not in taken}


def need(parts: Parts, name: str, ending: str, *dtypes: str, dims: int | None = None) -> TensorInfo:
    """A part of a matrix. Raises TensorError if it is missing, or of another dtype or number of dimensions."""
    info = parts.get(ending)
    if info is None:
        raise TensorError(
            f"the checkpoint lacks {printable(name + ending)!r}, which a quantized matrix needs",
            hint="A shard is missing, or the weights are quantized otherwise than config.json says.",
            tensor=name + ending,
        )
    if (dtypes and info.dtype not in dtypes) or (dims is not None and len(info.shape) != dims) or 0 in info.shape:
        raise misfit(info, f"it is {info.dtype} {list(info.shape)}")
    return info


def misfit(info: TensorInfo, what: str) -> TensorError:
    return TensorError(
        f"tensor {printable(info.name)!r} in {info.path.name} is not quantized as config.json says: {what}",
        hint="The config does not belong to these weights.",
        tensor=info.name,
    )


def setting(
    settings: Mapping[str, Any], name: str, allowed: tuple[int, ...] | range, default: int | None = None
) -> int:
    """An integer of `quantization_config`. Raises UnsupportedError for one that is not decoded."""
    value = settings.get(name, default)
    if type(value) is not int or value not in allowed:
        raise UnsupportedError(
            f"config.json: quantization_config has {name!r} {printable(value, 40)}, which is not decoded", field=name
        )
    return value


def unpacked(words: NDArray[Any], bits: int, axis: int) -> NDArray[np.int32]:
    """Small integers out of 32-bit words along an axis, those of the lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    words = np.moveaxis(words.view(np.uint32), axis, -1)
    values = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    flat = values.reshape(*words.shape[:-1], -1).astype(np.int32)
    return np.moveaxis(flat, -1, axis)


def runs(indices: Index) -> tuple[int, int]:
    """The first index and one more than the last."""
    return int(indices.min()), int(indices.max()) + 1


def matrix(info: TensorInfo, name: str, shape: tuple[int, ...], read: ReadRows) -> Weights:
    """Decoded weights under the name of the unquantized tensor; messages call it by what is stored."""
    return Weights(shape, None, name, info.path.name, read)
