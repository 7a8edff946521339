"""A read-only look at a GGUF file: its metadata, its tensors, and whether it is whole.

The file is a stranger's. Every length is held against the size of the file before it is used, nothing is
allocated for what is merely announced, and whatever is wrong is a ModelFileError that says where. The rules
are those of llama.cpp's own reader (versions 2 and 3, little endian, tensors one after the other without
gaps), so that a file that passes here is one that llama.cpp opens. It is a parser of our own since it must
answer before llama.cpp is loaded, fast (a vocabulary is stepped over, and read when asked for), and in
words that help.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeAlias, overload

from models.gguf_cursor import ARRAY, SCALARS, STRING, Cursor, Scalar, looks_like, open_gguf
from models.gguf_types import FILE_TYPES, TENSOR_TYPES
from models.text import human_bytes, printable

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_KEY_BYTES = 65_535
MAX_DIMENSIONS = 4
MAX_TENSOR_NAME_BYTES = 63
_KINDS = {"general.alignment": 4, "split.no": 2, "split.count": 2, "split.tensors.count": 5}
"""Keys that end llama.cpp's process where they have another type: u32, u16, u16, i32."""


class LazyArray(Sequence[Scalar]):
    """An array of the metadata, left in the file until somebody looks at an element, then read whole."""

    def __init__(self, path: Path, offset: int, element_type: int, count: int) -> None:
        self._path, self._offset, self._type, self._count = path, offset, element_type, count
        self._items: list[Scalar] | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Scalar: ...
    @overload
    def __getitem__(self, index: slice) -> list[Scalar]: ...
    def __getitem__(self, index: int | slice) -> Scalar | list[Scalar]:
        if self._items is None:
            with open_gguf(self._path) as cursor:
                cursor.position = self._offset
                self._items = [cursor.scalar(self._type, "an array") for _ in range(self._count)]
        return self._items[index]

    def __repr__(self) -> str:
        return f"<{self._count} values>"


Value: TypeAlias = Scalar | LazyArray


@dataclass(frozen=True)
class TensorInfo:
    """One tensor. `shape` in GGUF order, a row's length first. `offset` in bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int

    @property
    def weights(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says of itself. `size` in bytes."""

    path: Path
    version: int
    size: int
    metadata: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]

    def string(self, key: str) -> str | None:
        """The text under `key`; None where there is none or it is no text."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def integer(self, key: str) -> int | None:
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def architecture(self) -> str:
        return self.string("general.architecture") or "unknown"

    @property
    def name(self) -> str:
        return self.string("general.name") or self.path.stem

    @property
    def file_type(self) -> str:
        """Such as "Q4_K_M": what the file says, else the type that most of its bytes have."""
        number = self.integer("general.file_type")
        if number is not None and number in FILE_TYPES:
            return FILE_TYPES[number]
        return self.main_type

    @property
    def chat_template(self) -> str | None:
        return self.string("tokenizer.chat_template")

    @property
    def context_length(self) -> int | None:
        """Tokens that the model was trained on."""
        return self.integer(f"{self.architecture}.context_length")

    @property
    def parameters(self) -> int:
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        parameters = self.parameters
        return 8 * sum(tensor.nbytes for tensor in self.tensors) / parameters if parameters else 0.0

    def bytes_by_type(self) -> dict[str, int]:
        """Bytes that the tensors of each type take, in the order of first appearance."""
        totals: Counter[str] = Counter()
        for tensor in self.tensors:
            totals[tensor.type] += tensor.nbytes
        return dict(totals)

    @property
    def main_type(self) -> str:
        """The tensor type that most of the bytes are in."""
        totals = self.bytes_by_type()
        return max(totals, key=totals.__getitem__, default="unknown")


def read_gguf(path: Path) -> GgufFile:
    """Read the header of `path` and hold every tensor against the size of the file. Raises ModelFileError."""
    with open_gguf(path) as cursor:
        version, n_tensors, n_kv = _counts(cursor)
        metadata = dict(_key_values(cursor, n_kv))
        tensors = _tensors(cursor, n_tensors, _alignment(cursor, metadata))
        return GgufFile(path, version, cursor.size, metadata, tensors)


def peek_gguf(path: Path) -> GgufFile:
    """Enough for a list of many files, quickly: where it can, the metadata before the vocabulary and no tensors.

    Raises ModelFileError, but may find only what is wrong in that part.
    """
    with open_gguf(path) as cursor:
        version, _, n_kv = _counts(cursor)
        metadata = dict(_key_values(cursor, n_kv, stop_before="tokenizer.ggml.tokens"))
        if "general.file_type" in metadata:
            return GgufFile(path, version, cursor.size, metadata, ())
    return read_gguf(path)  # it comes after the vocabulary, or it has to be counted from the tensors


def raw_metadata(path: Path) -> dict[str, bytes]:
    """Each key with its type and value, as the bytes that stand in the file, in their order. Raises ModelFileError."""
    with open_gguf(path) as cursor:
        _, _, n_kv = _counts(cursor)
        raw, start = {}, cursor.position
        for key, _ in _key_values(cursor, n_kv):
            raw[key] = cursor.data[start : cursor.position]
            start = cursor.position
        return raw


def _counts(cursor: Cursor) -> tuple[int, int, int]:
    """Magic, version and the two counts. Each entry takes bytes, so the file's size bounds both counts."""
    if cursor.data[:4] != b"GGUF":
        what, hint = looks_like(cursor.data[:512], cursor.size)
        cursor.fail(f"not a GGUF file: {what}", hint)
    cursor.position = 4
    version = cursor.u32("the version")
    if version and version & 0xFFFF == 0:
        cursor.fail("a big endian GGUF file; this machine reads little endian", "Get the little endian file.")
    if version not in VERSIONS:
        cursor.fail(
            f"GGUF version {version} is not supported (versions 2 and 3 are)",
            "Convert the original checkpoint again with `handmill convert`.",
        )
    n_tensors, n_kv = cursor.u64("the tensor count"), cursor.u64("the key count")
    left = cursor.size - cursor.position
    for count, smallest, what in ((n_tensors, 24, "tensors"), (n_kv, 14, "metadata keys")):
        if count * smallest > left:
            cursor.fail(f"{count} {what} are announced, which {left} bytes cannot hold")
    return version, n_tensors, n_kv


def _key_values(cursor: Cursor, n_kv: int, stop_before: str | None = None) -> Iterator[tuple[str, Value]]:
    seen: set[str] = set()
    for index in range(n_kv):
        key = cursor.text(f"metadata key {index}", MAX_KEY_BYTES)
        what = f"key '{printable(key)}'"
        if not key or "\0" in key:
            cursor.fail(f"metadata key {index} is empty" if not key else f"{what} has a NUL in it")
        if key in seen:
            cursor.fail(f"{what} appears twice")
        if key == stop_before:
            return
        seen.add(key)
        kind = cursor.u32(what)
        if kind != _KINDS.get(key, kind):
            cursor.fail(f"{what} has a value of type {kind}; llama.cpp takes type {_KINDS[key]} only")
        if kind != ARRAY:
            yield key, cursor.scalar(kind, what)
            continue
        element, count = cursor.u32(what), cursor.u64(what)
        array = LazyArray(cursor.path, cursor.position, element, count)
        if element == STRING:
            cursor.skip_strings(count, what)
        elif element in SCALARS:
            cursor.advance(count * SCALARS[element].size, what)
        else:
            cursor.fail(f"{what} is an array of the unknown value type {element}")
        yield key, array


def _alignment(cursor: Cursor, metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        cursor.fail(f"the alignment is {printable(alignment)}, which is no power of two")
    return alignment


def _tensors(cursor: Cursor, n_tensors: int, alignment: int) -> tuple[TensorInfo, ...]:
    """Every tensor info, with offsets from the file's start; each begins where the one before it ended."""
    tensors: list[TensorInfo] = []
    seen: set[str] = set()
    expected = 0
    for index in range(n_tensors):
        tensor = _tensor(cursor, index)
        what = f"tensor '{printable(tensor.name)}'"
        if tensor.name in seen:
            cursor.fail(f"{what} appears twice")
        seen.add(tensor.name)
        if tensor.offset % alignment:
            cursor.fail(f"{what} is misaligned: offset {tensor.offset} is no multiple of {alignment}")
        if tensor.offset != expected:
            fault = "overlaps the tensor before it" if tensor.offset < expected else "leaves a gap before it"
            cursor.fail(f"{what} {fault}: offset {tensor.offset}, expected {expected}")
        expected += -(-tensor.nbytes // alignment) * alignment
        tensors.append(tensor)
    start = -(-cursor.position // alignment) * alignment
    if tensors and (needed := start + tensors[-1].offset + tensors[-1].nbytes) > cursor.size:
        cursor.fail(
            f"the file is cut short: its tensors need {needed} bytes ({human_bytes(needed)}), "
            f"it has {cursor.size} ({human_bytes(cursor.size)})"
        )
    return tuple(TensorInfo(t.name, t.shape, t.type, start + t.offset, t.nbytes) for t in tensors)


def _tensor(cursor: Cursor, index: int) -> TensorInfo:
    name = cursor.text(f"the name of tensor {index}", MAX_TENSOR_NAME_BYTES)
    what = f"tensor '{printable(name)}'"
    n_dimensions = cursor.u32(what)
    if n_dimensions > MAX_DIMENSIONS:
        cursor.fail(f"{what} has {n_dimensions} dimensions, at most {MAX_DIMENSIONS} are possible")
    shape = tuple(cursor.u64(what) for _ in range(n_dimensions))
    number = cursor.u32(what)
    offset = cursor.u64(what)
    if number not in TENSOR_TYPES:
        cursor.fail(
            f"{what} has the unknown tensor type {number}",
            "The file may need a newer llama.cpp, or be damaged.",
        )
    kind, block, block_bytes = TENSOR_TYPES[number]
    row = shape[0] if shape else 1
    if row % block:
        cursor.fail(f"{what} has rows of {row} weights; {kind} needs a multiple of {block}")
    nbytes = prod(shape) // block * block_bytes
    if nbytes >= 1 << 63:
        cursor.fail(f"{what} has the impossible shape {list(shape)}")
    return TensorInfo(name, shape, kind, offset, nbytes)
