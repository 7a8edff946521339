"""Where the entries of a zip archive lie, for archives as torch.save writes them: nothing compressed, nothing hidden.

Sources: PKWARE's APPNOTE.TXT 6.3, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to 4.3.16 (its
end), 4.5.3 (sizes of 64 bits).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from models.errors import CheckpointError, UnsupportedError
from models.text import printable

MAX_ENTRIES = 200_000
MAX_DIRECTORY_BYTES = 32 << 20

_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT = 0xFFFF
_ABSENT_32 = 0xFFFF_FFFF
_ENCRYPTED = 1


@dataclass(frozen=True)
class ZipEntry:
    """The bytes of one file: `nbytes` of the archive from `offset`."""

    offset: int
    nbytes: int


def zip_entries(file: BinaryIO, path: Path) -> dict[bytes, ZipEntry]:
    """The entries of the archive by name, all of them stored, none over another, all within the file.

    `path` is for messages. Raises CheckpointError, and UnsupportedError for what is compressed or encrypted.
    """
    size = file.seek(0, 2)
    start, length, count = _directory(file, size, path)
    if length > MAX_DIRECTORY_BYTES or count > MAX_ENTRIES:
        raise broken(path, f"its directory says {count:,} entries in {length:,} bytes")
    directory = _read(file, start, length, path)
    entries: dict[bytes, ZipEntry] = {}
    spans: list[tuple[int, int]] = []
    for name, local, nbytes in _central_headers(directory, count, path):
        if name in entries:
            raise broken(path, f"it has the entry {_shown(name)} twice")
        offset = _data_offset(file, local, name, path)
        entries[name] = ZipEntry(offset, nbytes)
        spans.append((local, offset + nbytes))
    end = 0
    for first, last in sorted(spans):
        if first < end:
            raise broken(path, "its entries overlap")
        end = last
    if end > start:
        raise broken(path, "its entries reach beyond the place of its directory")
    return entries


def _directory(file: BinaryIO, size: int, path: Path) -> tuple[int, int, int]:
    """Position, bytes and number of entries of the central directory."""
    tail_start = max(0, size - _END.size - _MAX_COMMENT)
    tail = _read(file, tail_start, size - tail_start, path)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise broken(path, "it has no directory at its end")
    _, disk, first_disk, _, count, length, start, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    locator_at = at - _LOCATOR_64.size
    if locator_at >= 0 and tail[locator_at : locator_at + 4] == b"PK\x06\x07":
        _, disk, end, _ = _LOCATOR_64.unpack_from(tail, locator_at)
        record = _read(file, end, _END_64.size, path)
        signature, _, _, _, _, first_disk, _, count, length, start = _END_64.unpack(record)
        if signature != b"PK\x06\x06":
            raise broken(path, "the end of its directory is not where it should be")
    if disk or first_disk:
        raise broken(path, "it is one of several parts")
    if start + length > end:
        raise broken(path, "its directory is not where it should be")
    return start, length, count


def _central_headers(directory: bytes, count: int, path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Name, position of the local header, and bytes of each entry."""
    at = 0
    for _ in range(count):
        if len(directory) - at < _CENTRAL.size:
            raise broken(path, "its directory is cut short")
        (
            signature, _, _, flags, method, _, _, _, packed, nbytes, n_name, n_extra, n_comment, _, _, _, local,
        ) = _CENTRAL.unpack_from(directory, at)  # fmt: skip
        at += _CENTRAL.size
        name, extra = directory[at : at + n_name], directory[at + n_name : at + n_name + n_extra]
        at += n_name + n_extra + n_comment
        if signature != b"PK\x01\x02" or at > len(directory):
            raise broken(path, "its directory is damaged")
        if method or flags & _ENCRYPTED:
            raise UnsupportedError(
                f"{_shown(name)} in {path} is {'compressed' if method else 'encrypted'}",
                hint="torch.save stores tensors as they are. Unpack the archive and save the state dict again.",
                path=path,
            )
        nbytes, packed, local = _wide(extra, [nbytes, packed, local], path)
        if nbytes != packed:
            raise broken(path, f"the entry {_shown(name)} has two sizes")
        yield name, local, nbytes


def _wide(extra: bytes, values: list[int], path: Path) -> list[int]:
    """The values, those of 0xFFFFFFFF replaced by the ones of 64 bits in the extra field."""
    if _ABSENT_32 not in values:
        return values
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            fields = extra[at + 4 : at + 4 + length]
            wide = iter(struct.unpack(f"<{len(fields) // 8}Q", fields[: len(fields) // 8 * 8]))
            return [next(wide, value) if value == _ABSENT_32 else value for value in values]
        at += 4 + length
    raise broken(path, "its directory lacks a size of 64 bits")


def _data_offset(file: BinaryIO, local: int, name: bytes, path: Path) -> int:
    """Where the data of an entry begins: after its local header, which must be of the same entry."""
    header = _read(file, local, _LOCAL.size, path)
    signature, _, _, method, _, _, _, _, _, n_name, n_extra = _LOCAL.unpack(header)
    data: int = local + _LOCAL.size + n_name + n_extra
    same_name = n_name == len(name) and _read(file, local + _LOCAL.size, n_name, path) == name
    if signature != b"PK\x03\x04" or method or not same_name:
        raise broken(path, f"the entry {_shown(name)} is not where the directory says")
    return data


def _read(file: BinaryIO, offset: int, n: int, path: Path) -> bytes:
    if offset >= 2**63:
        raise broken(path, "its directory points beyond its end")
    file.seek(offset)
    data = file.read(n)
    if len(data) != n:
        raise broken(path, "it is cut short")
    return data


def _shown(name: bytes) -> str:
    return repr(printable(name.decode("utf-8", "replace"), 120))


def broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the archive {path} cannot be read: {reason}", hint="It is damaged or cut short. Fetch it again.", path=path
    )
