"""Rows from shards through the encoder to their places in the file, in slabs, on every core.

A slab is small enough to stay in a core's cache and to balance the work of all of them; memory is a few slabs a
thread, whatever the size of the model. Slabs are written where they belong, in any order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convert.checkpoint import ITEM_BYTES
from convert.output import translated
from convert.quantize import F32, TensorType, decode_rows, encode_rows, prepare_encoder, rounded_to
from convert.tensors import TensorPlan, interleave_halves
from models.errors import ConversionFailed, TensorError
from models.text import printable

SLAB_WEIGHTS = 1 << 18
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class PlacedTensor:
    """A planned tensor with its type and its place: `offset` and `nbytes` in the file.

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
    def source_bytes(self) -> int:
        source = self.tensor.plan.source
        return self.n_rows * self.tensor.plan.row_length * ITEM_BYTES[source.dtype] if source else 0


def write_tensors(
    tensors: Sequence[PlacedTensor], path: Path, *, threads: int, progress: Callable[[int], None]
) -> None:
    """Encode all tensors into the file at `path`. `progress` is told the bytes read, in the calling thread.

    Raises TensorError (NaN or infinity, a shard that shrank), OutputError, ConversionFailed.
    """
    prepare_encoder(list({tensor.kind.id: tensor.kind for tensor in tensors}.values()))
    work = _Work(_slabs(tensors))
    workers = [threading.Thread(target=work.run, args=(path,), daemon=True) for _ in range(threads)]
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            time.sleep(_POLL_SECONDS) if len(workers) > 1 else workers[0].join(_POLL_SECONDS)
            progress(work.bytes_read)
    finally:
        # Ctrl-C lands here too: the slabs under way end, no new one begins.
        work.stop = True
        for worker in workers:
            if worker.ident is not None:
                worker.join()
    if work.error is not None:
        raise work.error


def _slabs(tensors: Sequence[PlacedTensor]) -> Iterator[_Slab]:
    for tensor in tensors:
        plan = tensor.plan
        together = plan.rows_together
        rows = max(SLAB_WEIGHTS // (plan.row_length * together), 1) * together if len(plan.shape) > 1 else 1
        for first in range(0, plan.n_rows, rows):
            yield _Slab(tensor, first, min(rows, plan.n_rows - first))


class _Work:
    """Slabs handed out one at a time to the threads that ask, and the first error of any of them."""

    def __init__(self, slabs: Iterator[_Slab]) -> None:
        self._slabs = slabs
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.error: Exception | None = None
        self.stop = False

    def run(self, path: Path) -> None:
        try:
            with translated(path), path.open("r+b", buffering=0) as file:
                while (slab := self._next()) is not None:
                    encoded = _encode(slab)
                    tensor = slab.tensor
                    with translated(path):
                        file.seek(tensor.offset + slab.first_row * tensor.kind.row_bytes(tensor.plan.row_length))
                        rest = encoded.data
                        while rest:
                            rest = rest[file.write(rest) :]
                    with self._lock:
                        self.bytes_read += slab.source_bytes
        except Exception as error:  # carried to the thread that waits, and raised there
            with self._lock:
                self.error = self.error or error
                self.stop = True

    def _next(self) -> _Slab | None:
        with self._lock:
            return None if self.stop else next(self._slabs, None)


def _encode(slab: _Slab) -> NDArray[np.uint8]:
    plan, kind = slab.tensor.plan, slab.tensor.kind
    values = _read(slab)
    try:
        if not np.isfinite(values).all():
            raise ConversionFailed("it holds NaN or infinity")
        return encode_rows(values, kind)
    except ConversionFailed as error:
        name = plan.source.name if plan.source else plan.name
        where = f" in {plan.source.path.name}" if plan.source else ""
        raise TensorError(
            f"tensor {printable(name)!r}{where}: {error} (in rows from {slab.first_row})",
            hint="The checkpoint is damaged. Fetch it again." if "NaN" in str(error) else "Choose another --type.",
            tensor=name,
        ) from error


def _read(slab: _Slab) -> NDArray[np.float32]:
    """The rows of a slab as float32 [n_rows, row_length], in llama.cpp's order, rounded as its converter would."""
    plan = slab.tensor.plan
    if plan.source is None:
        assert plan.values is not None
        return plan.values.reshape(plan.n_rows, plan.row_length)[slab.first_row : slab.first_row + slab.n_rows]
    source = plan.source
    item = ITEM_BYTES[source.dtype]
    raw = np.empty((slab.n_rows, plan.row_length), np.uint16 if item == 2 else np.uint32)
    try:
        # Opening costs microseconds, and a checkpoint may have more shards than a process may have open files.
        with source.path.open("rb", buffering=0) as file:
            file.seek(source.offset + slab.first_row * plan.row_length * item)
            rest = raw.data.cast("B")
            while rest and (n := file.readinto(rest)):
                rest = rest[n:]
    except OSError as error:
        raise TensorError(f"cannot read {source.path}: {error.strerror}", tensor=source.name) from error
    if rest:
        raise TensorError(f"{source.path} was cut short while it was read", tensor=source.name)
    if plan.heads:
        if len(plan.shape) == 1:
            raw = interleave_halves(raw.reshape(-1, 1), plan.heads).reshape(raw.shape)
        else:
            raw = interleave_halves(raw, slab.n_rows // plan.rows_together)
    values = decode_rows(raw, source.dtype)
    carrier = slab.tensor.carrier
    if carrier.name != source.dtype and carrier is not F32:
        values = rounded_to(values, carrier)
    return values
