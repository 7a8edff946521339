"""The weights that clients have sent to a worker, on its disk: whole ones only, and within a size.

llama.cpp's RPC server names a file by a hash of what is in it, and takes it for the tensor however long it is.
"""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path

from models.errors import OutputError
from models.files import write_json

_LOOK_SECONDS = 2.0
_SETTLED_SECONDS = 4.0
"""After which a file that was not written to is whole."""
_INDEX = "index.json"
_NAME = re.compile("[0-9a-f]{16}")


def forget_what_is_cut(folder: Path) -> None:
    """Delete what is not known to be whole: llama.cpp takes a file of the cache for the tensor, however long it is."""
    known = _known(folder)
    for file in _files(folder):
        if known.get(file.name) != _mark(file):
            file.unlink(missing_ok=True)


def trim_cache(folder: Path, limit: int, now: float) -> None:
    """Delete the files used longest ago until the others take `limit` bytes; keep in mind those that are whole."""
    held = [(max(s.st_atime, s.st_mtime), s.st_size, file) for file in _files(folder) if (s := file.stat())]
    total = sum(size for _, size, _ in held)
    for _, size, file in sorted(held):
        if total <= limit:
            break
        file.unlink(missing_ok=True)
        total -= size
    known = _known(folder)
    whole = {}
    for file in _files(folder):
        mark = _mark(file)
        if known.get(file.name) != mark:
            if now - file.stat().st_mtime < _SETTLED_SECONDS:
                continue
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        whole[file.name] = mark
    if whole != known:
        write_json(folder / _INDEX, whole)


def keep_cache(folder: Path, limit: int) -> None:
    """Trim it now and then, for ever."""
    while True:
        with suppress(OSError, OutputError):  # one that goes meanwhile, a full disk: the next look is soon
            trim_cache(folder, limit, time.time())
        time.sleep(_LOOK_SECONDS)


def _known(folder: Path) -> dict[str, object]:
    with suppress(OSError, ValueError):
        found = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _mark(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if _NAME.fullmatch(file.name) and file.is_file()]
