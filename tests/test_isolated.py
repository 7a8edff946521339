"""Calls in a process of their own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from models import isolated
from models.errors import TensorError
from models.isolated import Ended, Kind, Silent, isolation


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


def count(n: int) -> Iterator[int]:
    yield from range(n)
    raise TensorError("no more", tensor=str(n))


def count_slowly() -> Iterator[int]:
    for i in range(1000):
        yield i
        time.sleep(0.01)


def say_and_sleep(seconds: float) -> str:
    for share in (0.25, 0.5):
        isolated.send(share)
        time.sleep(seconds)
    isolated.announce(7)
    time.sleep(seconds)
    return "done"


def test_pieces_of_an_answer_come_one_by_one() -> None:
    heard: list[float] = []
    with isolation() as apart:
        with pytest.raises(TensorError, match="no more"):
            apart.call(count, 3, heard=heard.append)
        assert heard == [0, 1, 2]
        apart.ask(count, 2)
        assert [apart.hear(10), apart.hear(10)] == [(Kind.PIECE, 0), (Kind.PIECE, 1)]
        with pytest.raises(TensorError):
            apart.hear(10)
        with pytest.raises(Silent):
            apart.hear(0.05)
        assert apart.call(len, "four") == 4


def test_what_of_an_abandoned_call_still_comes_is_not_heard() -> None:
    with isolation() as apart:
        apart.ask(count, 1_000)
        assert apart.hear(10) == (Kind.PIECE, 0)
        assert apart.call(len, "four") == 4


def test_a_sign_of_life_gives_more_time() -> None:
    heard: list[float] = []
    with isolation() as apart:
        assert apart.call(say_and_sleep, 0.8, seconds=1.6, heard=heard.append) == "done"
        assert heard == [0.25, 0.5]
        apart.ask(say_and_sleep, 0.0)
        assert [apart.hear(10) for _ in range(4)][2:] == [(Kind.WORKING, 7), (Kind.END, "done")]


def test_what_is_told_is_done_beside_a_call() -> None:
    with isolation() as apart:
        apart.ask(count_slowly)
        apart.hear(10)
        apart.tell(os._exit, 7)
        with pytest.raises(Ended, match="status 7"):
            apart.call(len, "four")


def test_it_ends_with_the_process_that_started_it() -> None:
    """Also when that is killed while a call is computed."""
    code = (
        "import os, time\n"
        "from models.isolated import isolation\n"
        "with isolation() as apart:\n"
        "    print(apart.call(os.getpid), flush=True)\n"
        "    apart.call(time.sleep, 1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    for _ in range(500):
        if not is_alive(pid):
            return
        time.sleep(0.02)
    raise AssertionError("it lives on")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with suppress(OSError):  # nobody may have waited for it
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return True
