"""Calls in a process of their own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models import isolated
from models.errors import TensorError
from models.isolated import Ended, isolation


def refuse(name: str) -> None:
    raise TensorError(f"no {name}", hint="Look again.", tensor=name)


def fault() -> None:
    raise KeyError("x")


def abort_as_ggml_does() -> None:
    os.write(2, b"/home/x/ggml/src/ggml.c:17: GGML_ASSERT(a / b == c) failed\n")
    os.abort()


def fill(n: int) -> bytes:
    print("what is printed does not get between the answers")
    return b"x" * n


def test_answers_and_errors_arrive() -> None:
    with isolation() as apart:
        pid = apart.call(os.getpid)
        assert pid != os.getpid()
        with pytest.raises(TensorError, match="no output") as raised:
            apart.call(refuse, "output")
        assert (raised.value.hint, raised.value.tensor) == ("Look again.", "output")
        with pytest.raises(Ended, match="KeyError: 'x'"):
            apart.call(fault)
        assert len(apart.call(fill, 3_000_000)) == apart.call(len, b"x" * 3_000_000) == 3_000_000
        assert apart.call(os.getpid) == pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("function", "args", "says"),
    [
        (abort_as_ggml_does, (), r"SIGABRT: ggml.c:17: GGML_ASSERT\(a / b == c\) failed\)"),
        (ctypes.string_at, (0,), "SIGSEGV"),
        (os._exit, (0,), "status 0"),
        (os._exit, (3,), "status 3"),
        (os.write, (2, b"\x1b[2J\xff\n" * 100_000), "SIGABRT"),
    ],
)
def test_a_process_that_ends(function: Callable[..., Any], args: tuple[object, ...], says: str) -> None:
    with isolation() as apart:
        if function is os.write:  # what is said is bounded, and steers no terminal
            apart.call(function, *args)
            function, args = os.abort, ()
        with pytest.raises(Ended, match=says) as raised:
            apart.call(function, *args)
        assert str(raised.value).isprintable()
        with pytest.raises(Ended):
            apart.call(os.getpid)


def test_what_does_not_end_is_ended() -> None:
    with isolation() as apart, pytest.raises(Ended, match=r"longer than 0.2 s"):
        apart.call(time.sleep, 1000, seconds=0.2)


def test_a_process_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "_CHILD", "raise SystemExit('no python here')")
    with isolation() as apart, pytest.raises(Ended, match="no python here"):
        apart.call(len, b"x" * 1_000_000)


def test_an_interrupt_ends_it_and_not_the_other_way_round() -> None:
    with isolation() as apart:
        pid = apart.call(os.getpid)
        os.kill(pid, signal.SIGINT)
        assert apart.call(os.getpid) == pid
        timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            apart.call(time.sleep, 1000)
        timer.join()


def test_it_does_not_outlive_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Watched(subprocess.Popen[bytes]):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[call-overload]
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Watched)
    with pytest.raises(ZeroDivisionError), isolation():
        raise ZeroDivisionError
    assert started[0].returncode is not None


def test_nothing_beside_the_working_directory_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the person's own called `models` is no package of ours."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    with isolation("models.errors") as apart:
        assert apart.call(len, "four") == 4
