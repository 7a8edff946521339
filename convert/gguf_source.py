"""A GGUF file as the source: its tensors in other types, everything else as it is.

The same bytes as llama-quantize writes: the metadata key for key, but for the file type, the version of the types
and what speaks of parts, which a new file has of its own; tensors whose type stays are copied.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from convert import quantize
from convert.check import check_apart, check_forward_pass
from convert.file_types import DEFAULT, FileType
from convert.gguf_writer import TypedValue
from convert.output import check_outputs, whole_files
from convert.pipeline import PlacedTensor, available_cores, write_tensors
from convert.placement import (
    ConversionReport,
    FilePlan,
    Progress,
    choose_types,
    data_bytes,
    in_order,
    part_headers,
    part_paths,
    write_headers,
)
from convert.quantize import TensorType
from convert.stored import raw_rows, stored
from convert.tensor_info import TensorInfo
from convert.tensors import TensorPlan
from models import gguf_file
from models.errors import TensorError, UnsupportedError
from models.gguf_file import GgufFile, raw_metadata
from models.gguf_parts import check_model_file, read_parts
from models.isolated import Isolated, isolation
from models.text import printable
from models.weights import Index, Weights

# What a new file says for itself; alignment, since llama-quantize itself pads to 32 bytes whatever this key says.
_OWN_KEYS = frozenset({"general.alignment", "split.no", "split.count", "split.tensors.count"})
_FLOATS = frozenset({"F32", "F16", "BF16"})
# llama.cpp's log, which names the types, is read line by line
_PLAIN_NAME = re.compile(r"[\w.-]+", re.ASCII)


def convert_gguf(
    source: Path,
    output: Path,
    file_type: FileType = DEFAULT,
    *,
    force: bool = False,
    check: bool = True,
    threads: int | None = None,
    requantize: bool = False,
    split_size: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> ConversionReport:
    """Convert the GGUF file `source`, or the first part of one, to `output`, which appears whole or not at all.

    With a `split_size` in bytes it comes in parts named after `output`. Raises the errors of `plan_gguf`,
    OutputError, CheckFailed.
    """
    started = time.monotonic()
    threads = threads or available_cores()
    check_outputs(part_paths(output, (), split_size), 0, force=force)
    progress("planning", 0, 1)
    with isolation("convert.check", "convert.quantize") as isolated:
        plan = _plan(source, file_type, requantize, split_size, isolated)
        paths = part_paths(output, plan.tensors, split_size)
        with whole_files(paths, data_bytes(plan.tensors), force=force) as partials:
            write_headers(plan, partials)
            starts = [len(header) for header in plan.headers]

            def encoded(n_weights: int) -> None:
                progress("encoding", plan.source_bytes * n_weights // plan.n_weights, plan.source_bytes)

            write_tensors(plan.tensors, partials, data_start=lambda wait: starts, threads=threads, progress=encoded)
            if check:
                progress("checking", plan.source_bytes, plan.source_bytes)
                check_apart(isolated, check_forward_pass, partials[0], threads)
    return ConversionReport(paths[0], tuple(paths), plan, time.monotonic() - started, check)


def plan_gguf(
    source: Path, file_type: FileType = DEFAULT, *, requantize: bool = False, split_size: int | None = None
) -> FilePlan:
    """Read the header; let llama.cpp look the model over and choose the types.

    A quantized tensor whose type would change is refused unless `requantize`. Raises ModelFileError, TensorError,
    UnsupportedError, ConversionFailed, UsageError.
    """
    with isolation("convert.quantize") as isolated:
        return _plan(source, file_type, requantize, split_size, isolated)


def _plan(source: Path, file_type: FileType, requantize: bool, split_size: int | None, isolated: Isolated) -> FilePlan:
    check_model_file(source)
    parts = read_parts(source)
    raw = raw_metadata(source)
    metadata: dict[str, TypedValue | bytes] = {key: raw[key] for key in raw if key not in _OWN_KEYS}
    tensors = {tensor.name: _Source(part, tensor) for part in parts for tensor in part.tensors}
    held = in_order(tensor.placed(tensor.kind) for tensor in tensors.values())
    if not held:
        raise TensorError(f"{printable(source)} has no tensors", hint="It holds a vocabulary alone, or an adapter.")
    types = choose_types(source, held, metadata, file_type, isolated)
    if types.keys() != tensors.keys():
        raise TensorError(f"llama.cpp reads other tensor names than {printable(source)} has")
    for name, kind in types.items():
        tensors[name].check(kind, requantize)
    placed = in_order((tensors[name].placed(kind) for name, kind in types.items()), split_size)
    for key, value in {
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "general.file_type": file_type.id,
    }.items():
        metadata.pop(key, None)  # a key that is set goes to the end
        metadata[key] = SimpleNamespace(value=value, type=GGUFValueType.UINT32)
    headers = part_headers(placed, metadata, split_size)
    return FilePlan(file_type, tuple(placed), headers, sum(part.size for part in parts))


@dataclass(frozen=True)
class _Source:
    """A tensor of the source, in the file that holds it."""

    file: GgufFile
    info: gguf_file.TensorInfo

    @property
    def kind(self) -> TensorType:
        return quantize.tensor_type(self.info.type)

    @property
    def shape(self) -> tuple[int, ...]:
        """Outermost first, without outer sizes of 1, as llama.cpp writes them."""
        shape = list(self.info.shape) or [1]
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        return tuple(reversed(shape))

    def placed(self, kind: TensorType) -> PlacedTensor:
        """The tensor in type `kind`. Raises TensorError for a name or shape that no model has."""
        name, shape, dtype = self.info.name, self.shape, self.info.type
        if not _PLAIN_NAME.fullmatch(name) or 0 in shape:
            raise TensorError(
                f"{printable(self.file.path)}: tensor {printable(name)!r} of shape {list(shape)} is of no model",
                hint="Names have letters, digits, dots and dashes, sizes are above 0.",
                tensor=name,
            )
        if dtype in _FLOATS:
            weights = stored(TensorInfo(name, dtype, shape, self.file.path, self.info.offset, self.info.nbytes))
        else:
            weights = Weights(shape, "F32", name, self.file.path.name, self._decoded)
        plan = TensorPlan(name, weights)
        if kind == self.kind:
            return PlacedTensor(plan, kind, kind, copied=self._copied)
        return PlacedTensor(plan, kind, self.kind if dtype in _FLOATS else quantize.F32)

    def check(self, kind: TensorType, requantize: bool) -> None:
        """Raises UnsupportedError if the tensor cannot, or shall not, become one of type `kind`."""
        if kind == self.kind or self.info.type in _FLOATS:
            return
        what = f"{printable(self.file.path)}: tensor {self.info.name!r} is {self.info.type}"
        if not quantize.is_decoded(self.kind):
            raise UnsupportedError(f"{what}, which llama.cpp does not decode", tensor=self.info.name)
        if not requantize:
            raise UnsupportedError(
                f"{what}, and would become {kind.name}: what is quantized twice loses twice",
                hint="Convert the F16 or BF16 file or the checkpoint; --requantize does it all the same.",
                tensor=self.info.name,
            )

    def _copied(self, first: int, n: int) -> NDArray[np.uint8]:
        return self._bytes(np.arange(first, first + n)).reshape(-1)

    def _decoded(self, rows: Index, columns: slice) -> NDArray[np.float32]:
        values = quantize.decode_blocks(self._bytes(rows), self.kind)
        return values.reshape(len(rows), self.shape[-1])[:, columns]

    def _bytes(self, rows: Index) -> NDArray[np.uint8]:
        """Rows of the file as bytes, [rows, bytes of a row]."""
        row_bytes = self.kind.row_bytes(self.shape[-1])
        shape = (prod(self.shape[:-1]), row_bytes)
        info = TensorInfo(self.info.name, "U8", shape, self.file.path, self.info.offset, self.info.nbytes)
        return raw_rows(info, rows, slice(0, row_bytes)).view(np.uint8)
