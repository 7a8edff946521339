"""Tensors as recipes: what would be read, in which order, and what is done to it, before anything is read.

A `Weights` knows its shape and how to read any of its rows. Selecting, splitting, stacking and transposing make new
ones, so that a slab of the converted tensor reads what it needs of the checkpoint and nothing more: the experts of a
block become one tensor without ever being held together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
ReadRows = Callable[[Index, slice], NDArray[np.float32]]
"""Row numbers [n] and a range of columns (start and stop, no step) to values [n, columns]."""


@dataclass(frozen=True)
class Packed:
    """Rows that are encoded already, in a tensor type of GGUF: their bytes, one row after the other."""

    type: str
    read: Callable[[Index], NDArray[np.uint8]]


@dataclass(frozen=True)
class Weights:
    """A tensor that is read by rows.

    shape   outermost first. Rows run over all dimensions but the last; those of a vector have one element each
    dtype   "F32", "F16" or "BF16" if that holds every value exactly; None for what arithmetic made
    name    what it is called in the checkpoint, and `file` where it lies, for messages
    read    the rows, as float32
    packed  the same rows as a file may take them
    """

    shape: tuple[int, ...]
    dtype: str | None
    name: str
    file: str
    read: ReadRows
    packed: Packed | None = None

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def row_length(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.n_weights

    @property
    def grid(self) -> Index:
        """The row numbers, in the shape of the tensor without its last dimension (of a vector: in its shape)."""
        outer = self.shape[:-1] if len(self.shape) > 1 else self.shape
        return np.arange(self.n_rows).reshape(outer)

    def rows(self, first: int, n: int) -> NDArray[np.float32]:
        """Rows `first` to `first + n`, [n, row_length]."""
        return self.read(np.arange(first, first + n), slice(0, self.row_length))

    def values(self) -> NDArray[np.float32]:
        """The whole tensor in its shape: for small ones."""
        return self.rows(0, self.n_rows).reshape(self.shape)

    def pick(self, index: Index) -> Weights:
        """The rows that `index` names, in any order and shape: `w.pick(w.grid[:, ::2])`."""
        flat = np.ascontiguousarray(index).reshape(-1)
        shape = (*index.shape, self.row_length) if len(self.shape) > 1 else index.shape
        whole = self.packed
        packed = None if whole is None else Packed(whole.type, lambda rows: whole.read(flat[rows]))
        return replace(self, shape=shape, read=lambda rows, columns: self.read(flat[rows], columns), packed=packed)

    def pick_columns(self, index: Index) -> Weights:
        """The elements of each row that `index` [n] names; not for vectors."""
        first, last = int(index.min()), int(index.max())
        shift = index - first
        run = len(index) == last - first + 1 and bool((shift == np.arange(len(index))).all())

        def read(rows: Index, columns: slice) -> NDArray[np.float32]:
            if run:
                return self.read(rows, slice(first + columns.start, first + columns.stop))
            return np.ascontiguousarray(self.read(rows, slice(first, last + 1))[:, shift[columns]])

        return replace(self, shape=(*self.shape[:-1], len(index)), read=read, packed=None)

    def transposed(self) -> Weights:
        """The last two dimensions change places."""
        *outer, n_in, n_out = self.shape

        def read(rows: Index, columns: slice) -> NDArray[np.float32]:
            result = np.empty((len(rows), columns.stop - columns.start), np.float32)
            matrices, lines = rows // n_out, rows % n_out
            for matrix in np.unique(matrices):
                here = matrices == matrix
                first, last = int(lines[here].min()), int(lines[here].max())
                source = matrix * n_in + np.arange(columns.start, columns.stop)
                result[here] = self.read(source, slice(first, last + 1)).T[lines[here] - first]
            return result

        return replace(self, shape=(*outer, n_out, n_in), read=read, packed=None)

    def reshaped(self, *shape: int) -> Weights:
        """The same elements in another shape, -1 for the one size that follows from the others."""
        if -1 in shape:
            rest = self.n_weights // -math.prod(shape)
            shape = tuple(rest if size == -1 else size for size in shape)
        if math.prod(shape) != self.n_weights:
            raise ValueError(f"{list(self.shape)} does not become {list(shape)}")
        old, new = self.row_length, shape[-1] if len(shape) > 1 else 1
        read = self.read
        if new != old:

            def read(rows: Index, columns: slice) -> NDArray[np.float32]:
                elements = (rows * new)[:, None] + np.arange(columns.start, columns.stop)
                owners, places = np.unique(elements // old, return_inverse=True)
                return self.read(owners, slice(0, old))[places.reshape(elements.shape), elements % old]

        return replace(self, shape=shape, read=read, packed=self.packed if new == old else None)

    def mapped(self, function: Callable[[NDArray[np.float32]], Any]) -> Weights:
        """Each element by itself through `function`, in float32."""

        def read(rows: Index, columns: slice) -> NDArray[np.float32]:
            return np.ascontiguousarray(function(self.read(rows, columns)), np.float32)

        return replace(self, dtype=None, read=read, packed=None)

    def named(self, name: str) -> Weights:
        """Messages call it so."""
        return replace(self, name=name)


def constant(name: str, values: NDArray[np.float32]) -> Weights:
    """Values that follow from the config, as a tensor."""
    matrix = values.reshape(-1, values.shape[-1] if values.ndim > 1 else 1)
    return Weights(values.shape, "F32", name, "config.json", lambda rows, columns: matrix[rows, columns])


def zeros(name: str, shape: tuple[int, ...]) -> Weights:
    """A tensor of zeros, which takes no memory."""

    def read(rows: Index, columns: slice) -> NDArray[np.float32]:
        return np.zeros((len(rows), columns.stop - columns.start), np.float32)

    return Weights(shape, "F32", name, "config.json", read)


def concatenated(parts: Sequence[Weights]) -> Weights:
    """One after the other along the first dimension. Raises ValueError if their other dimensions differ."""
    first = parts[0]
    if any(part.shape[1:] != first.shape[1:] for part in parts):
        raise ValueError(f"{[list(part.shape) for part in parts]} do not go together")
    ends = np.cumsum([part.n_rows for part in parts])

    def read(rows: Index, columns: slice) -> NDArray[np.float32]:
        owners = np.searchsorted(ends, rows, side="right")
        if len(rows) and owners[0] == owners[-1] and (owners == owners[0]).all():
            owner = int(owners[0])
            return parts[owner].read(rows - (ends[owner] - parts[owner].n_rows), columns)
        result = np.empty((len(rows), columns.stop - columns.start), np.float32)
        for owner in np.unique(owners):
            here = owners == owner
            result[here] = parts[owner].read(rows[here] - (ends[owner] - parts[owner].n_rows), columns)
        return result

    dtype = first.dtype if all(part.dtype == first.dtype for part in parts) else None
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return replace(first, shape=shape, dtype=dtype, read=read, packed=None)


def stacked(parts: Sequence[Weights]) -> Weights:
    """A new first dimension over tensors of one shape. Raises ValueError if the shapes differ."""
    first = parts[0]
    if any(part.shape != first.shape for part in parts):
        raise ValueError(f"{[list(part.shape) for part in parts[:4]]} are not of one shape")
    whole = concatenated([part.reshaped(1, *part.shape) for part in parts])
    return replace(whole, shape=(len(parts), *first.shape))
