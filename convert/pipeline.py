"""Rows from shards through the encoder to their places in the file, in slabs, on every core.

A slab is small enough to stay in a core's cache and to balance the work of all of them; memory is a few slabs a
thread, whatever the size of the model. Slabs are written where they belong, in any order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convert.output import translated
from convert.quantize import TensorType, encode_rows, prepare_encoder, rounded_to
from convert.tensors import TensorPlan
from models.errors import ConversionFailed, TensorError
from models.text import printable

SLAB_WEIGHTS = 1 << 18
_POLL_SECONDS = 0.05
_WAITING_BYTES = 64 << 20


@dataclass(frozen=True)
class PlacedTensor:
    """A planned tensor with its type and its place: `offset` in the file's tensor data, `nbytes` of it.

    `carrier` is the type that llama.cpp's converter would have stored it in before llama-quantize.
    """

    plan: TensorPlan
    kind: TensorType
    carrier: TensorType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class _Slab:
    tensor: PlacedTensor
    first_row: int
    n_rows: int

    @property
    def n_weights(self) -> int:
        return self.n_rows * self.tensor.plan.row_length


DataStart = Callable[[bool], int | None]
"""Where the tensor data begins in the file, in bytes; None while that is not known. Told to wait, it waits a while."""


def write_tensors(
    tensors: Sequence[PlacedTensor],
    path: Path,
    *,
    data_start: DataStart,
    threads: int,
    progress: Callable[[int], None],
) -> None:
    """Encode all tensors into the file at `path`. `progress` is told the weights that are done, in the calling
    thread.

    Slabs that are ready before `data_start` is known wait in memory, a bounded number of them. Raises TensorError
    (NaN or infinity, a shard that shrank), OutputError, ConversionFailed, and what `data_start` and `progress` raise.
    """
    prepare_encoder(list({tensor.kind.id: tensor.kind for tensor in tensors}.values()))
    work = _Work(_slabs(tensors), data_start, _WAITING_BYTES // threads)
    workers = [threading.Thread(target=work.run, args=(path,), daemon=True) for _ in range(threads)]
    try:
        for worker in workers:
            worker.start()
        running = True
        while running:
            if work.ended.wait(_POLL_SECONDS):
                work.ended.clear()  # set again by the next thread that ends
            running = any(worker.is_alive() for worker in workers)
            progress(work.n_done)
    finally:
        # Ctrl-C lands here too: the slabs under way end, no new one begins.
        work.stop = True
        for worker in workers:
            if worker.ident is not None:
                worker.join()
    if work.error is not None:
        raise work.error


def _slabs(tensors: Sequence[PlacedTensor]) -> Iterator[_Slab]:
    # Types of large blocks take longest by far: first, so that little waits in memory until `data_start` is known.
    for tensor in sorted(tensors, key=lambda tensor: -tensor.kind.block):
        plan = tensor.plan
        rows = max(SLAB_WEIGHTS // plan.row_length, 1)
        for first in range(0, plan.n_rows, rows):
            yield _Slab(tensor, first, min(rows, plan.n_rows - first))


class _Work:
    """Slabs handed out one at a time to the threads that ask, and the first error of any of them."""

    def __init__(self, slabs: Iterator[_Slab], data_start: DataStart, waiting_bytes: int) -> None:
        self._slabs = slabs
        self._data_start = data_start
        self._waiting_bytes = waiting_bytes
        self._lock = threading.Lock()
        self.n_done = 0
        self.error: Exception | None = None
        self.stop = False
        self.ended = threading.Event()

    def run(self, path: Path) -> None:
        try:
            with translated(path), path.open("r+b", buffering=0) as file:
                waiting: list[tuple[_Slab, NDArray[np.uint8]]] = []
                n_waiting = 0
                while (slab := self._next()) is not None:
                    encoded = _encode(slab)
                    waiting.append((slab, encoded))
                    n_waiting += encoded.nbytes
                    if self._write(file, waiting, wait=n_waiting > self._waiting_bytes):
                        n_waiting = 0
                self._write(file, waiting, wait=not self.stop)
        except Exception as error:  # carried to the thread that waits, and raised there
            with self._lock:
                self.error = self.error or error
                self.stop = True
        self.ended.set()

    def _write(self, file: FileIO, waiting: list[tuple[_Slab, NDArray[np.uint8]]], *, wait: bool) -> bool:
        """Write and forget the slabs that wait, if it is known where."""
        start = self._data_start(wait)
        while start is None and wait and not self.stop:
            start = self._data_start(wait)
        if start is None:
            return False
        for slab, encoded in waiting:
            tensor = slab.tensor
            row_bytes = tensor.kind.row_bytes(tensor.plan.row_length)
            file.seek(start + tensor.offset + slab.first_row * row_bytes)
            rest = encoded.data
            while rest:
                rest = rest[file.write(rest) :]
            with self._lock:
                self.n_done += slab.n_weights
        waiting.clear()
        return True

    def _next(self) -> _Slab | None:
        with self._lock:
            return None if self.stop else next(self._slabs, None)


def _encode(slab: _Slab) -> NDArray[np.uint8]:
    plan, kind, carrier = slab.tensor.plan, slab.tensor.kind, slab.tensor.carrier
    weights = plan.weights
    # a vector is one row of the file, and a row an element for those who read it
    per_row = plan.row_length // weights.row_length
    values = weights.rows(slab.first_row * per_row, slab.n_rows * per_row).reshape(slab.n_rows, plan.row_length)
    if not np.isfinite(values).all():
        raise _refused(slab, "it holds NaN or infinity", "The checkpoint is damaged. Fetch it again.")
    if weights.dtype != carrier.name:
        values = rounded_to(values, carrier)
        if not np.isfinite(values).all():
            reason = f"its values do not fit {carrier.name}, the type of the checkpoint's other matrices"
            raise _refused(slab, reason, "llama.cpp's converter would write infinity.")
    try:
        return encode_rows(values, kind)
    except ConversionFailed as error:
        raise _refused(slab, str(error), "Choose another --type.") from error


def _refused(slab: _Slab, reason: str, hint: str) -> TensorError:
    weights = slab.tensor.plan.weights
    return TensorError(
        f"tensor {printable(weights.name)!r} in {weights.file}: {reason} (in rows from {slab.first_row})",
        hint=hint,
        tensor=weights.name,
    )
