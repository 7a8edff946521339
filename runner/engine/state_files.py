"""Memories on disk: a document, a system prompt or a conversation that a later process goes on from.

A file has a header of our own before what llama.cpp wrote, since llama.cpp ends the process on a state that was cut
and takes one with a flipped bit: magic, length of the header, the header as JSON, token ids (int32), the state, the
checkpoints. Nothing of it reaches llama.cpp before lengths and digest are right, and a file that is not is deleted:
it is made again from the tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np

from runner.engine.snapshots import Checkpoint, Snapshot

DEFAULT_LIMIT = 4 << 30
"""Bytes of all states together."""
WORTH_STORING = 512
"""Tokens that a state must spare to be worth a file."""
_MAGIC = b"HMSTATE1"
_MOST_HEADER = 1 << 20
_CHUNK = 8 << 20
_SUFFIX = ".state"


@dataclass(frozen=True)
class StoredState:
    """The header of a file: what can be known of a state without reading it."""

    path: Path
    tokens: tuple[int, ...]
    first: int
    marks: tuple[int, ...]
    """At how many tokens there are checkpoints."""
    sizes: tuple[int, ...]
    """Bytes of the state and of each checkpoint."""
    digest: str
    start: int
    """Where the state begins in the file."""

    def without_data(self) -> Snapshot:
        """As a snapshot that can be asked what it would keep."""
        nothing = np.empty(0, np.uint8)
        return Snapshot(self.tokens, self.first, nothing, tuple(Checkpoint(n, nothing) for n in self.marks))


class StateFiles:
    """The states in `folder` that fit what `key` says: the model's file, and all that decides what a state holds."""

    def __init__(self, folder: Path, key: Callable[[], str], limit: int = DEFAULT_LIMIT) -> None:
        self._folder = folder
        self._facts = key
        self._limit = limit

    @cached_property
    def _key(self) -> str:
        return hashlib.sha256(self._facts().encode()).hexdigest()[:24]

    def stored(self) -> Iterator[StoredState]:
        """Every state of this key that looks whole. Those that do not are deleted."""
        for path in sorted(self._folder.glob(f"{self._key}-*{_SUFFIX}")):
            try:
                with path.open("rb") as file:
                    yield _read_header(path, file, self._key)
            except OSError:
                continue
            except (ValueError, RecursionError):
                _delete(path)

    def read(self, state: StoredState) -> Snapshot | None:
        """The whole of a state; None, and it is deleted, where its bytes are not those that were written."""
        try:
            with state.path.open("rb") as file:
                file.seek(state.start)
                parts = [np.fromfile(file, np.uint8, size) for size in state.sizes]
            os.utime(state.path)
        except OSError:
            return None
        checkpoints = tuple(Checkpoint(n, data) for n, data in zip(state.marks, parts[1:], strict=True))
        snapshot = Snapshot(state.tokens, state.first, parts[0], checkpoints)
        if _digest(self._key, snapshot) != state.digest:
            _delete(state.path)
            return None
        return snapshot

    def write(self, snapshot: Snapshot) -> None:
        """Keep a state. Those that it makes needless go, and the oldest beyond the limit. Raises OSError."""
        if snapshot.nbytes > self._limit:
            return
        digest = _digest(self._key, snapshot)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._folder / f"{self._key}-{digest[:24]}{_SUFFIX}"
        temporary = path.with_suffix(f".{os.getpid()}.part")
        try:
            temporary.touch(mode=0o600)
            with temporary.open("wb") as file:
                _write(file, self._key, digest, snapshot)
            temporary.replace(path)
        finally:
            _delete(temporary)
        for other in self.stored():
            if other.path != path and other.tokens == snapshot.tokens[: len(other.tokens)]:
                _delete(other.path)
        self._delete_oldest()

    def _delete_oldest(self) -> None:
        found = []
        for path in self._folder.glob(f"*{_SUFFIX}"):
            with suppress(OSError):
                facts = path.stat()
                found.append((facts.st_mtime_ns, facts.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._limit:
                break
            _delete(path)
            total -= size


def _write(file: IO[bytes], key: str, digest: str, snapshot: Snapshot) -> None:
    header = {
        "key": key,
        "n_tokens": len(snapshot.tokens),
        "first": snapshot.first,
        "marks": [point.n for point in snapshot.checkpoints],
        "sizes": [snapshot.data.nbytes, *(point.data.nbytes for point in snapshot.checkpoints)],
        "digest": digest,
    }
    encoded = json.dumps(header).encode()
    file.write(_MAGIC + struct.pack("<I", len(encoded)) + encoded)
    file.write(np.array(snapshot.tokens, "<i4").tobytes())
    for data in (snapshot.data, *(point.data for point in snapshot.checkpoints)):
        file.write(data.data)


def _read_header(path: Path, file: IO[bytes], key: str) -> StoredState:
    """Raises ValueError for what is no whole state of `key`."""
    size = os.fstat(file.fileno()).st_size
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("no state")
    (length,) = struct.unpack("<I", file.read(4).ljust(4, b"\xff"))
    if length > _MOST_HEADER:
        raise ValueError("no header")
    header = json.loads(file.read(length))
    if not isinstance(header, dict) or header.get("key") != key or not isinstance(header.get("digest"), str):
        raise ValueError("another header")
    marks, sizes = _naturals(header.get("marks")), _naturals(header.get("sizes"))
    n_tokens, first = _naturals([header.get("n_tokens"), header.get("first")])
    start = len(_MAGIC) + 4 + length + 4 * n_tokens
    if len(sizes) != len(marks) + 1 or start + sum(sizes) != size or any(n > n_tokens for n in marks):
        raise ValueError("not as long as it says")
    tokens = np.frombuffer(file.read(4 * n_tokens), "<i4")
    return StoredState(path, tuple(tokens.tolist()), first, marks, sizes, header["digest"], start)


def _naturals(values: object) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(n) is int and 0 <= n < 1 << 40 for n in values):
        raise ValueError("no numbers")
    return tuple(values)


def _digest(key: str, snapshot: Snapshot) -> str:
    """Of all that counts in a file. Chunks are hashed side by side: a state may have a gigabyte."""
    marks = [point.n for point in snapshot.checkpoints]
    whole = hashlib.sha256(json.dumps([key, snapshot.first, marks]).encode())
    whole.update(np.array(snapshot.tokens, "<i4").tobytes())
    chunks = [
        data[start : start + _CHUNK]
        for data in (snapshot.data, *(point.data for point in snapshot.checkpoints))
        for start in range(0, max(data.nbytes, 1), _CHUNK)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for digest in pool.map(lambda chunk: hashlib.sha256(chunk.data).digest(), chunks):
            whole.update(digest)
    return whole.hexdigest()


def _delete(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def model_key(path: Path, settings: Sequence[object]) -> str:
    """What a state is good for: the file of the model, told by its size, time, header and bytes all over it; settings.

    Raises OSError.
    """
    facts = path.stat()
    content = hashlib.sha256()
    with path.open("rb") as file:
        for place in range(64):
            file.seek(place * facts.st_size // 64)
            content.update(file.read(1 << 14))
    return json.dumps([facts.st_size, facts.st_mtime_ns, content.hexdigest(), *map(str, settings)])
