"""A file that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from models.errors import OutputError
from models.text import human_bytes

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed: that serves as the lock
    fcntl = None  # type: ignore[assignment]


_PARTIAL = ".partial"


@contextmanager
def whole_file(path: Path, nbytes: int, *, force: bool) -> Iterator[Path]:
    """A temporary file of `nbytes` beside `path`, which takes its name when the block ends without an error.

    Whatever else ends the block removes it. One that a killed run left behind is removed first; a lock tells it
    from one that is being written. Raises OutputError: the folder is missing or read-only, the file exists and
    `force` is false, the disk is too small.
    """
    check_output(path, nbytes, force=force)
    partial = _partial_of(path)
    with translated(path):
        file = _create_locked(partial, path)
    try:
        with translated(path):
            file.truncate(nbytes)
        yield partial
        with translated(path):
            os.fsync(file.fileno())
        if not force and path.exists():
            raise _exists(path)
        _let_go_on_windows(file)
        with translated(path):
            partial.replace(path)
            _sync_folder(path.parent)
    except BaseException:
        _let_go_on_windows(file)
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    finally:
        file.close()  # and with it the lock: until here no other run can take the name


def _let_go_on_windows(file: BinaryIO) -> None:
    """Windows neither renames nor removes a file that is open."""
    if fcntl is None:
        file.close()


def _partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}{_PARTIAL}")


def flush(path: Path) -> None:
    """Begin to bring a file to the disk, so that the sync at its end has less to wait for. An error shows there."""
    with suppress(OSError), path.open("rb+") as file:
        os.fsync(file.fileno())


def check_output(path: Path, nbytes: int, *, force: bool) -> None:
    """Raise OutputError for what can be known before anything is computed."""
    folder = path.parent
    with translated(path):  # a name may be too long even to be looked for
        is_folder, exists = path.is_dir(), path.exists()
    if is_folder:
        raise OutputError(f"{path} is a directory", hint="Give the name of a file: -o FOLDER/NAME.gguf.", path=path)
    if not folder.is_dir():
        raise OutputError(f"no such folder: {folder}", hint=f"Make it first: mkdir -p '{folder}'.", path=path)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{folder} is not writable", hint="Choose another place with -o.", path=path)
    if exists and not force:
        raise _exists(path)
    free = shutil.disk_usage(folder).free
    with suppress(OSError):  # what a killed run left behind makes room
        free += _partial_of(path).stat().st_blocks * 512
    if nbytes > free:
        raise OutputError(
            f"{path} will take {human_bytes(nbytes)}, and {folder} has {human_bytes(free)} free",
            hint="Make room, choose another place with -o, or a smaller --type.",
            path=path,
            needed=nbytes,
            free=free,
        )


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn an OSError of writing `path`, or of the temporary file for it, into an OutputError that says what to do."""
    if path.name.startswith(".") and path.name.endswith(_PARTIAL):
        path = path.with_name(path.name[1:].removesuffix(_PARTIAL))
    try:
        yield
    except OSError as error:
        hint = "Choose another place with -o."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "The disk is full. Make room, choose another place with -o, or a smaller --type."
        raise OutputError(f"cannot write {path}: {error.strerror}", hint=hint, path=path) from error


def _exists(path: Path) -> OutputError:
    return OutputError(f"{path} is already there", hint="--force replaces it; -o names another.", path=path)


def _create_locked(partial: Path, path: Path) -> BinaryIO:
    # Opened without truncating: the file may be another run's.
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0), 0o666)
    file = os.fdopen(fd, "r+b")
    try:
        if fcntl is not None:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, the run that held it may have given the file its name, or removed it.
            if not os.path.samestat(os.fstat(fd), partial.stat()):
                raise BlockingIOError
    except (BlockingIOError, FileNotFoundError) as error:
        file.close()
        raise OutputError(f"another run is writing {path}", hint="Wait for it, or choose another -o.") from error
    file.truncate(0)
    return file


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a power cut, where folders can be synced."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
