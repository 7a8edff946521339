"""Tensors as they lie in shards, as `Weights`: the leaves of every recipe."""

from __future__ import annotations

from collections.abc import Iterator
from io import FileIO

import numpy as np
from numpy.typing import NDArray

from convert.checkpoint import ITEM_BYTES
from convert.quantize import decode_rows
from convert.tensor_info import DTYPE_BYTES, TensorInfo
from models.errors import TensorError, UnsupportedError
from models.text import printable
from models.weights import Index, Weights

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SPAN = 2
"""Rows that lie apart are read as one run if that reads at most so many times what is wanted."""


def stored(info: TensorInfo) -> Weights:
    """A tensor of a shard. Reading raises TensorError if the shard is gone or cut short.

    Planning refuses a dtype that is not converted, but not behind arithmetic: there reading does, by UnsupportedError.
    """

    def read(rows: Index, columns: slice) -> NDArray[np.float32]:
        if info.dtype not in ITEM_BYTES:
            raise _unconverted(info.name, info.path.name, info.dtype)
        return decode_rows(raw_rows(info, rows, columns), info.dtype)

    return Weights(info.shape, info.dtype, info.name, info.path.name, read)


def check_readable(weights: Weights) -> None:
    """Raises UnsupportedError or TensorError for a tensor that is needed and of a type or shape that no file has."""
    if weights.dtype not in (None, *ITEM_BYTES):
        raise _unconverted(weights.name, weights.file, str(weights.dtype))
    if not 1 <= len(weights.shape) <= 4 or 0 in weights.shape:
        raise TensorError(
            f"tensor {printable(weights.name)!r} in {weights.file} has the shape {list(weights.shape)}, "
            "one to four sizes above 0 are converted",
            tensor=weights.name,
        )


def raw_rows(info: TensorInfo, rows: Index, columns: slice) -> NDArray[np.unsignedinteger]:
    """Rows of a tensor as unsigned integers of its item size, [rows, columns]. Raises TensorError."""
    if info.strides is not None:
        return _apart(info, info.strides, rows, columns)
    width = columns.stop - columns.start
    row_length = info.shape[-1] if len(info.shape) > 1 else 1
    raw = np.empty((len(rows), width), _UNSIGNED[DTYPE_BYTES[info.dtype]])
    try:
        # Opening costs microseconds, and a checkpoint may have more shards than a process may have open files.
        with info.path.open("rb", buffering=0) as file:
            if width != row_length:
                for line, row in zip(raw, rows, strict=True):
                    _fill(file, info, line, int(row) * row_length + columns.start)
                return raw
            first, last = int(rows.min()), int(rows.max())
            if last - first < _SPAN * len(rows):
                span = raw if last - first + 1 == len(rows) else np.empty((last - first + 1, width), raw.dtype)
                _fill(file, info, span, first * row_length)
                return span if _rising(rows) and span is raw else span[rows - first]
            for begin, end in _runs(rows):
                _fill(file, info, raw[begin:end], int(rows[begin]) * row_length)
    except OSError as error:
        raise TensorError(f"cannot read {info.path}: {error.strerror}", tensor=info.name) from error
    return raw


def _fill(file: FileIO, info: TensorInfo, array: NDArray[np.unsignedinteger], first_item: int) -> None:
    file.seek(info.offset + first_item * array.itemsize)
    rest = array.data.cast("B")
    while rest and (n := file.readinto(rest)):
        rest = rest[n:]
    if rest:
        raise TensorError(f"{info.path} was cut short while it was read", tensor=info.name)


def _apart(info: TensorInfo, strides: tuple[int, ...], rows: Index, columns: slice) -> NDArray[np.unsignedinteger]:
    """The same of a view whose elements do not lie one after the other, through the pages of the file."""
    outer = max(1, len(info.shape) - 1)
    firsts = np.array(strides[:outer]) @ np.array(np.unravel_index(rows, info.shape[:outer]))
    inner = strides[-1] if len(strides) > 1 else 0
    places = firsts[:, None] + inner * np.arange(columns.start, columns.stop)
    dtype = _UNSIGNED[DTYPE_BYTES[info.dtype]]
    try:
        pages = np.memmap(info.path, dtype, "r", info.offset, (int(places.max()) + 1,))
    except OSError as error:
        raise TensorError(f"cannot read {info.path}: {error.strerror}", tensor=info.name) from error
    except ValueError as error:
        raise TensorError(f"{info.path} was cut short while it was read", tensor=info.name) from error
    return np.asarray(pages[places])


def _rising(rows: Index) -> bool:
    return bool((np.diff(rows) == 1).all())


def _runs(rows: Index) -> Iterator[tuple[int, int]]:
    """Where in `rows` each run of neighbours begins and ends."""
    ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    begin = 0
    for end in ends:
        yield begin, end
        begin = end


def _unconverted(name: str, file: str, dtype: str) -> UnsupportedError:
    return UnsupportedError(
        f"tensor {printable(name)!r} in {file} is {dtype}; BF16, F16 and F32 are converted",
        hint="Convert the original bf16, f16 or f32 checkpoint.",
        tensor=name,
    )
