"""Rows from shards through the encoder to their places in the file, in slabs, on every core.

A slab is small enough to stay in a core's cache and to balance the work of all of them; memory is a few slabs a
thread, whatever the size of the model. Slabs are written where they belong, in any order.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convert.output import translated
from convert.quantize import TensorType, are_valid_rows, encode_rows, prepare_encoder, rounded_to
from convert.tensors import TensorPlan
from models.errors import ConversionFailed, TensorError
from models.text import printable

SLAB_WEIGHTS = 1 << 18
_POLL_SECONDS = 0.05
_WAITING_BYTES = 64 << 20
_DAMAGED = "It is damaged. Fetch it again."


@dataclass(frozen=True)
class PlacedTensor:
    """A planned tensor with its type and its place: `offset` in the tensor data of its `part`, `nbytes` of it.

    `carrier` is the type that llama.cpp's converter would have stored it in before llama-quantize. `copied` gives
    the bytes of rows (first, number) where the source holds them in this very type.
    """

    plan: TensorPlan
    kind: TensorType
    carrier: TensorType
    offset: int = 0
    nbytes: int = 0
    part: int = 0
    copied: Callable[[int, int], NDArray[np.uint8]] | None = None


@dataclass(frozen=True)
class _Slab:
    tensor: PlacedTensor
    first_row: int
    n_rows: int

    @property
    def n_weights(self) -> int:
        return self.n_rows * self.tensor.plan.row_length


DataStart = Callable[[bool], Sequence[int] | None]
"""Where the tensor data of each part begins, in bytes; None while that is not known. Told to wait, it waits."""


def write_tensors(
    tensors: Sequence[PlacedTensor],
    paths: Sequence[Path],
    *,
    data_start: DataStart,
    threads: int,
    progress: Callable[[int], None],
) -> None:
    """Encode all tensors into the file at `paths`, one path a part. `progress` is told the weights that are done, in
    the calling thread.

    Slabs that are ready before `data_start` is known wait in memory, a bounded number of them. Raises TensorError
    (NaN or infinity, a shard that shrank), OutputError, ConversionFailed, and what `data_start` and `progress` raise.
    """
    prepare_encoder(list({tensor.kind.id: tensor.kind for tensor in tensors}.values()))
    work = _Work(_slabs(tensors), paths, data_start, _WAITING_BYTES // threads)
    workers = [threading.Thread(target=work.run, daemon=True) for _ in range(threads)]
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


def available_cores() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _slabs(tensors: Sequence[PlacedTensor]) -> Iterator[_Slab]:
    # Types of large blocks take longest by far: first, so that little waits in memory until `data_start` is known.
    for tensor in sorted(tensors, key=lambda tensor: -tensor.kind.block):
        plan = tensor.plan
        rows = max(SLAB_WEIGHTS // plan.row_length, 1)
        for first in range(0, plan.n_rows, rows):
            yield _Slab(tensor, first, min(rows, plan.n_rows - first))


class _Work:
    """Slabs handed out one at a time to the threads that ask, and the first error of any of them."""

    def __init__(
        self, slabs: Iterator[_Slab], paths: Sequence[Path], data_start: DataStart, waiting_bytes: int
    ) -> None:
        self._slabs = slabs
        self._paths = paths
        self._data_start = data_start
        self._waiting_bytes = waiting_bytes
        self._lock = threading.Lock()
        self.n_done = 0
        self.error: Exception | None = None
        self.stop = False
        self.ended = threading.Event()

    def run(self) -> None:
        try:
            waiting: list[tuple[_Slab, NDArray[np.uint8]]] = []
            n_waiting = 0
            while (slab := self._next()) is not None:
                encoded = _encode(slab)
                waiting.append((slab, encoded))
                n_waiting += encoded.nbytes
                if self._write(waiting, wait=n_waiting > self._waiting_bytes):
                    n_waiting = 0
            self._write(waiting, wait=not self.stop)
        except Exception as error:  # carried to the thread that waits, and raised there
            with self._lock:
                self.error = self.error or error
                self.stop = True
        self.ended.set()

    def _write(self, waiting: list[tuple[_Slab, NDArray[np.uint8]]], *, wait: bool) -> bool:
        """Write and forget the slabs that wait, if it is known where."""
        starts = self._data_start(wait)
        while starts is None and wait and not self.stop:
            starts = self._data_start(wait)
        if starts is None:
            return False
        for slab, encoded in waiting:
            tensor = slab.tensor
            path = self._paths[tensor.part]
            row_bytes = tensor.kind.row_bytes(tensor.plan.row_length)
            # Opening costs microseconds, and a model may have more parts than a process may have open files.
            with translated(path), path.open("r+b", buffering=0) as file:
                file.seek(starts[tensor.part] + tensor.offset + slab.first_row * row_bytes)
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
    if slab.tensor.copied is not None:
        copied = slab.tensor.copied(slab.first_row, slab.n_rows)
        if not are_valid_rows(copied, kind):
            raise _refused(slab, "it holds NaN or infinity, or what is no scale", _DAMAGED)
        return copied
    weights = plan.weights
    # a vector is one row of the file, and a row an element for those who read it
    per_row = plan.row_length // weights.row_length
    if weights.packed is not None and weights.packed.type == kind.name:
        return weights.packed.read(np.arange(slab.first_row, slab.first_row + slab.n_rows))
    values = weights.rows(slab.first_row * per_row, slab.n_rows * per_row).reshape(slab.n_rows, plan.row_length)
    if not np.isfinite(values).all():
        raise _refused(slab, "it holds NaN or infinity", _DAMAGED)
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
