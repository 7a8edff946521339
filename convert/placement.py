"""What a file holds and where: each tensor with its type, in a part and at a place of it. Shared by all sources."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from gguf.constants import GGUFValueType

from convert import quantize
from convert.file_types import FileType
from convert.gguf_writer import TensorEntry, TypedValue, header_bytes, padded
from convert.output import translated
from convert.pipeline import PlacedTensor
from models.errors import ConversionFailed, UsageError
from models.gguf_parts import MAX_PARTS, part_name
from models.isolated import HINT, Ended, Isolated
from models.text import human_bytes, printable

Stage = Literal["planning", "encoding", "checking"]
Progress = Callable[[Stage, int, int], None]
"""Told the stage, the bytes of the source that are done, and all of them."""

Metadata = Mapping[str, TypedValue | bytes]


@dataclass(frozen=True)
class TypeTotal:
    """How much of a file has one tensor type."""

    kind: str
    n_tensors: int
    n_bytes: int


@dataclass(frozen=True)
class FilePlan:
    """All that is known before a weight is read. Sizes in bytes; `headers`: one a part."""

    file_type: FileType
    tensors: tuple[PlacedTensor, ...]
    headers: tuple[bytes, ...]
    source_bytes: int

    @property
    def header(self) -> bytes:
        """Of the first part, which holds all metadata."""
        return self.headers[0]

    @property
    def n_bytes(self) -> int:
        return sum(map(len, self.headers)) + sum(data_bytes(self.tensors))

    @property
    def n_weights(self) -> int:
        return sum(tensor.plan.n_weights for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return sum(tensor.nbytes for tensor in self.tensors) * 8 / self.n_weights

    @property
    def totals(self) -> list[TypeTotal]:
        """By tensor type, the largest share first."""
        by_kind: dict[str, list[int]] = {}
        for tensor in self.tensors:
            by_kind.setdefault(tensor.kind.name, []).append(tensor.nbytes)
        totals = [TypeTotal(kind, len(sizes), sum(sizes)) for kind, sizes in by_kind.items()]
        return sorted(totals, key=lambda total: -total.n_bytes)


@dataclass(frozen=True)
class ConversionReport:
    """A finished conversion. `path` is what to load, `paths` all parts of it."""

    path: Path
    paths: tuple[Path, ...]
    plan: FilePlan
    seconds: float
    checked: bool
    warnings: list[str] = field(default_factory=list)


def choose_types(
    source: Path, tensors: Sequence[PlacedTensor], metadata: Metadata, file_type: FileType, isolated: Isolated
) -> dict[str, quantize.TensorType]:
    """Let llama.cpp look the model over, and name the type of each tensor in the order in which it writes them.

    It is asked on a hollow file of `tensors` in the types that it would quantize from. Raises TensorError,
    UnsupportedError, ConversionFailed.
    """
    names = {tensor.plan.name: tensor.plan.weights.name for tensor in tensors}
    header = part_headers(tensors, metadata)[0]
    try:
        return isolated.call(quantize.look_over, header, sum(data_bytes(tensors)), file_type, names)
    except Ended as ended:
        raise ConversionFailed(
            f"llama.cpp cannot make a model of {printable(source)}: {ended}",
            hint=HINT,
            path=source,
        ) from None


def in_order(tensors: Iterable[PlacedTensor], split_size: int | None = None) -> list[PlacedTensor]:
    """Tensors one after the other, in parts of at most `split_size` bytes of tensor data where that is given.

    Raises UsageError for a tensor that is larger than a part, and for too many parts.
    """
    placed, part, offset = [], 0, 0
    for tensor in tensors:
        nbytes = tensor.plan.n_rows * tensor.kind.row_bytes(tensor.plan.row_length)
        size = padded(nbytes)
        if split_size is not None and size > split_size:
            raise UsageError(
                f"--split-size {human_bytes(split_size)} is too small for tensor {printable(tensor.plan.name)!r}, "
                f"which takes {human_bytes(size)} ({size:,} bytes)",
                hint="A tensor is not split. Give a larger --split-size.",
            )
        if split_size is not None and offset + size > split_size:
            part, offset = part + 1, 0
        placed.append(replace(tensor, offset=offset, nbytes=nbytes, part=part))
        offset += size
    if part >= MAX_PARTS:
        raise UsageError(f"--split-size makes {part + 1:,} parts, at most {MAX_PARTS:,} are possible")
    return placed


def data_bytes(tensors: Sequence[PlacedTensor]) -> list[int]:
    """Bytes of tensor data in each part."""
    sizes = [0] * (tensors[-1].part + 1)
    for tensor in tensors:
        sizes[tensor.part] += padded(tensor.nbytes)
    return sizes


def part_paths(output: Path, tensors: Sequence[PlacedTensor], split_size: int | None) -> list[Path]:
    """The files to write: `output` itself, or the names of its parts (while there are no tensors, of one)."""
    if split_size is None:
        return [output]
    base, count = output.name.removesuffix(".gguf"), tensors[-1].part + 1 if tensors else 1
    return [output.with_name(part_name(base, number, count)) for number in range(1, count + 1)]


def part_headers(
    tensors: Sequence[PlacedTensor], metadata: Metadata, split_size: int | None = None
) -> tuple[bytes, ...]:
    """The header of each part. Raises struct.error, OverflowError, UnicodeEncodeError for what cannot be stored."""
    n_parts = tensors[-1].part + 1
    entries: list[list[TensorEntry]] = [[] for _ in range(n_parts)]
    for tensor in tensors:
        plan = tensor.plan
        entries[tensor.part].append(TensorEntry(plan.name, plan.shape[::-1], tensor.kind.id, tensor.nbytes))
    if split_size is None:
        return (header_bytes(metadata, entries[0]),)
    headers = []
    for part in range(n_parts):
        keys: dict[str, TypedValue] = {
            "split.no": SimpleNamespace(value=part, type=GGUFValueType.UINT16),
            "split.tensors.count": SimpleNamespace(value=len(tensors), type=GGUFValueType.INT32),
            "split.count": SimpleNamespace(value=n_parts, type=GGUFValueType.UINT16),
        }
        headers.append(header_bytes({**(metadata if part == 0 else {}), **keys}, entries[part]))
    return tuple(headers)


def write_headers(plan: FilePlan, partials: Sequence[Path]) -> None:
    """Write the header of each part, and give the part its size. Raises OutputError."""
    for partial, header, nbytes in zip(partials, plan.headers, data_bytes(plan.tensors), strict=True):
        with translated(partial), partial.open("r+b") as file:
            file.write(header)
            file.truncate(len(header) + nbytes)
