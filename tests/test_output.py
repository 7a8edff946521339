"""A file that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from convert.output import check_output, translated, whole_file, whole_files
from models.errors import OutputError
from models.gguf_parts import part_name

WRITER = """
import sys, time
from pathlib import Path
from convert.output import whole_file
with whole_file(Path(sys.argv[1]), 1000, force=True) as partial:
    partial.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out" / "model.gguf"


@pytest.fixture(autouse=True)
def folder(path: Path) -> Path:
    path.parent.mkdir()
    return path.parent


def files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@contextmanager
def another_run(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of writing `path`."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "writing\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_takes_its_name_when_it_is_whole(path: Path) -> None:
    with whole_file(path, 4, force=False) as partial:
        assert not path.exists()
        assert partial.parent == path.parent
        assert partial.stat().st_size == 4
        with partial.open("r+b") as file:
            file.write(b"GGUF")
    assert path.read_bytes() == b"GGUF"
    assert files(path.parent) == ["model.gguf"]


def test_it_is_on_the_disk_before_it_has_its_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(path.exists()))
    with whole_file(path, 4, force=False):
        pass
    assert synced == [False, True]  # the file, then the folder


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_the_block_removes_it(path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), whole_file(path, 4, force=False):
        raise error
    assert files(path.parent) == []


def test_missing_folder(path: Path) -> None:
    path.parent.rmdir()
    with pytest.raises(OutputError, match="no such folder") as raised:
        check_output(path, 4, force=False)
    assert "mkdir -p" in raised.value.hint


def test_the_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="no such folder"):
        check_output(tmp_path / "file" / "model.gguf", 4, force=False)


def test_the_output_is_a_folder(path: Path) -> None:
    path.mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        check_output(path, 4, force=True)


def test_an_existing_file_is_kept_unless_forced(path: Path) -> None:
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match="is already there") as raised, whole_file(path, 4, force=False):
        pass
    assert "--force" in raised.value.hint
    assert path.read_bytes() == b"old"
    with whole_file(path, 4, force=True):
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == bytes(4)


def test_a_failure_keeps_the_file_that_was_to_be_replaced(path: Path) -> None:
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="stop"), whole_file(path, 4, force=True):
        raise ValueError("stop")
    assert path.read_bytes() == b"old"
    assert files(path.parent) == ["model.gguf"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_set_is_replaced_whole_or_not_at_all(
    path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old set has three parts and the new one two; it fails when the last of these is to take its name."""
    folder = path.parent
    old = [folder / part_name("m", number, 3) for number in range(1, 4)]
    new = [folder / part_name("m", number, 2) for number in range(1, 3)]
    for number, part in enumerate(old):
        part.write_bytes(bytes([number]))
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if target == new[0]:
            raise error("stopped")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises((OutputError, error)), whole_files(new, [1, 1], force=True):
        pass
    assert files(folder) == [part.name for part in old]
    assert [part.read_bytes() for part in old] == [bytes([number]) for number in range(3)]
    monkeypatch.undo()
    for _ in range(2):  # over another number of parts, and over its own
        with whole_files(new, [4, 4], force=True):
            pass
        assert files(folder) == [part.name for part in new]


def test_a_file_that_came_meanwhile_is_kept(path: Path) -> None:
    with pytest.raises(OutputError, match="is already there"), whole_file(path, 4, force=False):
        path.write_bytes(b"other")
    assert path.read_bytes() == b"other"
    assert files(path.parent) == ["model.gguf"]


def test_no_room_is_said_before_anything_is_written(path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"will take .* has .* free") as raised,
        whole_file(path, 1 << 60, force=True),
    ):
        pass
    assert raised.value.needed == 1 << 60
    assert files(path.parent) == []


def test_a_write_that_fails_removes_the_file(path: Path) -> None:
    """A limit on the size of files stands for every way in which a disk can refuse bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*: File too large"), whole_file(path, 2000, force=True):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert files(path.parent) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_called_so(path: Path, code: int) -> None:
    with pytest.raises(OutputError, match="cannot write") as raised, translated(path):
        raise OSError(code, os.strerror(code))
    assert "disk is full" in raised.value.hint


def test_two_runs_to_one_file(path: Path) -> None:
    with another_run(path):
        with pytest.raises(OutputError, match="another run is writing"), whole_file(path, 4, force=True):
            pass
        assert files(path.parent) == [".model.gguf.partial"]


def test_what_a_killed_run_left_is_removed_by_the_next(path: Path) -> None:
    with another_run(path) as process:
        process.kill()
        process.wait()
        assert files(path.parent) == [".model.gguf.partial"]
        with whole_file(path, 4, force=False):
            pass
    assert path.read_bytes() == bytes(4)
    assert files(path.parent) == ["model.gguf"]


def test_no_link_is_followed(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    path.with_name(".model.gguf.partial").symlink_to(target)
    with pytest.raises(OutputError, match="cannot write"), whole_file(path, 4, force=True):
        pass
    assert target.read_bytes() == b"precious"


def test_a_very_long_name(path: Path) -> None:
    with pytest.raises(OutputError), whole_file(path.with_name("x" * 250 + ".gguf"), 4, force=True):
        pass
    assert files(path.parent) == []


def test_no_other_run_gets_in_between_the_last_byte_and_the_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run that tries while the file takes its name is told so, and empties nothing."""
    refused: list[str] = []
    replace = Path.replace

    def replace_slowly(partial: Path, target: Path) -> Path:
        with pytest.raises(OutputError, match="another run is writing") as raised, whole_file(path, 1, force=True):
            pass
        refused.append(str(raised.value))
        return replace(partial, target)

    monkeypatch.setattr(Path, "replace", replace_slowly)
    with whole_file(path, 5, force=True) as partial:
        partial.write_bytes(b"whole")
    assert len(refused) == 1
    assert path.read_bytes() == b"whole"


def test_a_file_that_took_its_name_while_another_run_waited_to_lock_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    flock = fcntl.flock

    def lock_late(fd: int, operation: int) -> None:
        path.with_name(f".{path.name}.partial").replace(path)  # what the other run does at its end
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    path.with_name(f".{path.name}.partial").write_bytes(b"whole")
    with pytest.raises(OutputError, match="another run is writing"), whole_file(path, 1, force=True):
        pass
    assert path.read_bytes() == b"whole"
