"""A file, or a set of files, that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from models.errors import OutputError
from models.gguf_parts import part_name, split_name
from models.text import human_bytes

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed: that serves as the lock
    fcntl = None  # type: ignore[assignment]


_PARTIAL, _OLD = ".partial", ".old"


@contextmanager
def whole_file(path: Path, nbytes: int, *, force: bool) -> Iterator[Path]:
    """`whole_files` for one file."""
    with whole_files([path], [nbytes], force=force) as [partial]:
        yield partial


@contextmanager
def whole_files(paths: Sequence[Path], sizes: Sequence[int], *, force: bool) -> Iterator[list[Path]]:
    """Temporary files of `sizes` bytes beside `paths`, of one folder, which take their names when the block ends
    without an error, the first one last.

    Whatever else ends the block removes them. What a killed run left behind is removed first; a lock on the first
    tells it from what is being written. Raises OutputError: the folder is missing or read-only, a file exists and
    `force` is false, the disk is too small.
    """
    check_outputs(paths, sum(sizes), force=force)
    partials = [_partial_of(path) for path in paths]
    with translated(paths[0]):
        lock = _create_locked(partials[0], paths[0])
    try:
        for path, partial, nbytes in zip(paths, partials, sizes, strict=True):
            with translated(path):
                if partial is not partials[0]:
                    partial.unlink(missing_ok=True)
                    partial.touch(exist_ok=False)
                os.truncate(partial, nbytes)
        yield partials
        for path, partial in zip(paths, partials, strict=True):
            with translated(path), partial.open("rb+") as file:
                os.fsync(file.fileno())
            if not force and path.exists():
                raise _exists(path)
        _let_go_on_windows(lock)
        with _set_aside([*paths, *_other_sets(paths)] if len(paths) > 1 else []):
            _name(partials, paths)
        _sync_folder(paths[0].parent)
    except BaseException:
        _let_go_on_windows(lock)
        _remove(partials)
        raise
    finally:
        lock.close()  # until here no other run can take the name


def _name(partials: Sequence[Path], paths: Sequence[Path]) -> None:
    """Give the files their names, the first one last: all or none."""
    named: list[Path] = []
    try:
        for path, partial in zip(reversed(paths), reversed(partials), strict=True):
            with translated(path):
                partial.replace(path)
            named.append(path)
    except BaseException:
        _remove(named)
        raise


@contextmanager
def _set_aside(paths: Iterable[Path]) -> Iterator[None]:
    """Give the files of an old set other names while a new one takes theirs: they come back if the block fails.

    (One file is replaced in a single step.)
    """
    aside: list[tuple[Path, Path]] = []
    try:
        for path in paths:
            if path.exists():
                aside.append((path, path.with_name(f".{path.name}{_OLD}")))
                with translated(path):
                    path.replace(aside[-1][1])
        yield
    except BaseException:
        for path, old in reversed(aside):
            with suppress(OSError):
                old.replace(path)
        raise
    _remove(old for _, old in aside)


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _let_go_on_windows(file: BinaryIO) -> None:
    """Windows neither renames nor removes a file that is open."""
    if fcntl is None:
        file.close()


def _partial_of(path: Path) -> Path:
    """Hidden, and for a part of a set still named so that llama.cpp finds the others."""
    if part := split_name(path.stem):
        base, number, count = part
        return path.with_name(part_name(f".{base}{_PARTIAL}", number, count))
    return path.with_name(f".{path.name}{_PARTIAL}")


def _final_of(partial: Path) -> Path:
    """The inverse of `_partial_of`; another path is returned as it is."""
    part = split_name(partial.stem)
    name = part[0] if part else partial.name
    if not (name.startswith(".") and name.endswith(_PARTIAL)):
        return partial
    name = name[1:].removesuffix(_PARTIAL)
    return partial.with_name(part_name(name, *part[1:]) if part else name)


def _other_sets(paths: Sequence[Path]) -> list[Path]:
    """The parts of sets of the same name and of another number of parts."""
    part = split_name(paths[0].stem)
    if part is None:
        return []
    found = ((path, split_name(path.stem)) for path in paths[0].parent.iterdir() if path.suffix == paths[0].suffix)
    return sorted(path for path, other in found if other and other[0] == part[0] and other[2] != part[2])


def flush(path: Path) -> None:
    """Begin to bring a file to the disk, so that the sync at its end has less to wait for. An error shows there."""
    with suppress(OSError), path.open("rb+") as file:
        os.fsync(file.fileno())


def check_output(path: Path, nbytes: int, *, force: bool) -> None:
    """`check_outputs` for one file."""
    check_outputs([path], nbytes, force=force)


def check_outputs(paths: Sequence[Path], nbytes: int, *, force: bool) -> None:
    """Raise OutputError for what can be known before anything is computed. `nbytes`: of all files together."""
    folder = paths[0].parent
    for path in paths:
        with translated(path):  # a name may be too long even to be looked for
            is_folder = path.is_dir()
        if is_folder:
            raise OutputError(
                f"{path} is a directory", hint="Give the name of a file: -o FOLDER/NAME.gguf.", path=path
            )
    if not folder.is_dir():
        raise OutputError(f"no such folder: {folder}", hint=f"Make it first: mkdir -p '{folder}'.", path=paths[0])
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{folder} is not writable", hint="Choose another place with -o.", path=paths[0])
    with translated(paths[0]):
        existing = [*(path for path in paths if path.exists()), *_other_sets(paths)]
    if existing and not force:
        raise _exists(existing[0])
    free = shutil.disk_usage(folder).free
    for path in paths:
        with suppress(OSError):  # what a killed run left behind makes room
            free += _partial_of(path).stat().st_blocks * 512
    if nbytes > free:
        raise OutputError(
            f"{paths[0]} will take {human_bytes(nbytes)}{' in all' if len(paths) > 1 else ''}, "
            f"and {folder} has {human_bytes(free)} free",
            hint="Make room, choose another place with -o, or a smaller --type.",
            path=paths[0],
            needed=nbytes,
            free=free,
        )


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn an OSError of writing `path`, or of the temporary file for it, into an OutputError that says what to do."""
    path = _final_of(path)
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
