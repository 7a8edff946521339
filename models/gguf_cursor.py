"""A position in a GGUF file that cannot leave it, and what a file that is no GGUF looks like.

Every length is held against the size of the file before it is used; reading past the end is a ModelFileError.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeAlias

from models.errors import ModelFileError
from models.text import printable

MAX_STRING_BYTES = 1 << 26
MAX_STRINGS = 1 << 24
"""Ceilings far above any real file: the largest vocabulary has 2^18 entries, a template 10^5 bytes."""
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
STRING, ARRAY = 8, 9
SCALARS = {
    number: struct.Struct("<" + code)
    for number, code in {
        0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
    }.items()
}  # fmt: skip

Scalar: TypeAlias = int | float | bool | str


class Cursor:
    """A position in a mapped file. Reading past the end is a ModelFileError that gives both numbers."""

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self.path, self.data, self.position, self.size = path, data, 0, len(data)

    def fail(self, what: str, hint: str = "Download or convert the file again.") -> NoReturn:
        raise ModelFileError(f"{printable(self.path)}: {what}", hint=hint, path=self.path)

    def advance(self, count: int, what: str) -> int:
        """Step over `count` bytes; the position before them."""
        start, end = self.position, self.position + count
        if end > self.size:
            self.fail(f"the file is cut short or damaged: {what} reaches to byte {end}, the file has {self.size}")
        self.position = end
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.data, self.advance(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.data, self.advance(8, what))[0])

    def text(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        length = self.u64(what)
        start = self.advance(length, what)
        if length > limit:
            self.fail(f"{what} has {length} bytes, more than {limit}")
        return self.data[start : self.position].decode("utf-8", "replace")

    def scalar(self, kind: int, what: str) -> Scalar:
        if kind == STRING:
            return self.text(what)
        layout = SCALARS.get(kind)
        if layout is None:
            self.fail(f"{what} has the unknown value type {kind}")
        value: Scalar = layout.unpack_from(self.data, self.advance(layout.size, what))[0]
        return value

    def skip_strings(self, count: int, what: str) -> None:
        # The one loop over a vocabulary: 300 thousand lengths, so no call and no attribute in it.
        if count > MAX_STRINGS:
            self.fail(f"{what} has {count} strings, more than {MAX_STRINGS}")
        unpack, data, position, last = _U64.unpack_from, self.data, self.position, self.size - 8
        for _ in range(count):
            if position > last:
                position = self.size + 1
                break
            position += 8 + unpack(data, position)[0]
        self.advance(position - self.position, what)


@contextmanager
def open_gguf(path: Path) -> Iterator[Cursor]:
    try:
        if path.is_dir():
            raise ModelFileError(
                f"{printable(path)} is a directory, not a GGUF file",
                hint="Give the .gguf file inside it, or convert the checkpoint with `handmill convert`.",
                path=path,
            )
        if path.exists() and not path.is_file():
            raise ModelFileError(f"{printable(path)} is not a regular file", path=path)
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise ModelFileError(f"{printable(path)} is empty", hint="Download or convert it again.", path=path)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield Cursor(path, data)
    except FileNotFoundError:
        raise ModelFileError(
            f"{printable(path)} does not exist",
            hint="`handmill list` shows the models in the library.",
            path=path,
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelFileError(f"{printable(path)} cannot be read: {printable(reason)}", path=path) from error


_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "it is a git-lfs pointer, not the file itself", "Run `git lfs pull` there."),
    (b"PK\x03\x04", "it is a zip archive, perhaps a PyTorch checkpoint", ""),
    (b"\x80\x02", "it is a Python pickle, perhaps a PyTorch checkpoint", ""),
    (b"\x1f\x8b", "it is compressed with gzip", "Unpack it first."),
    (b"FUGG", "its magic is reversed: a big endian GGUF file", "Get the little endian file."),
    (b"tjgg", "it is a GGML file from before GGUF", ""),
    (b"lmgg", "it is a GGML file from before GGUF", ""),
    (b"fmgg", "it is a GGML file from before GGUF", ""),
    (b"{", "it looks like JSON", ""),
)
_CONVERT_HINT = "Give a GGUF file, or a Hugging Face checkpoint directory with config.json and its shards."


def looks_like(head: bytes, size: int) -> tuple[str, str]:
    """What a file that is no GGUF seems to be, and what to do about it."""
    stripped = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if stripped.startswith((b"<!doctype html", b"<html")):
        return "it is a web page (HTML), perhaps an error or login page", "Download the file itself."
    if len(head) > 8 and head[8:9] == b"{" and _U64.unpack_from(head)[0] < size:
        return (
            "it is a safetensors file, a shard of a checkpoint",
            "Convert the directory that holds it: `handmill convert DIRECTORY`.",
        )
    for signature, what, hint in _SIGNATURES:
        if head.startswith(signature):
            return what, hint or _CONVERT_HINT
    if not head.strip(b"\0"):
        return "it begins with zeros, like an unfinished download", "Download it again."
    return f"it begins with {head[:8]!r}", _CONVERT_HINT
