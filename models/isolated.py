"""Calls in a process of their own, for what a stranger's file or a device may end.

llama.cpp ends its process on some values of a file's metadata and on a device that is lost, and so may a parser: then
only this process ends, and the error has a name. It answers one call after the other. One serves a whole conversion:
it starts while the headers are read, lets llama.cpp look the model over, reads the tokenizer beside the encoding, and
checks the file. One serves a plan: it is asked about every placement that is considered.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TypeVar

from models.errors import HandmillError
from models.native import library, run_interruptibly
from models.text import printable

DEADLINE_SECONDS = 300
"""The largest tokenizers take a few seconds, a look at a large model less; what takes longer than this is made to."""
HINT = "A number in the model's config or metadata is wrong, such as that of its heads or experts, or a size."
_CHILD = "from models.isolated import serve; serve()"
_SAID_BYTES = 8192
_PLACE = re.compile(r"^\S*/(?=[^/]+:\d+: )")
"""The folder of a source file, at the head of what ggml says when it ends its process."""

Result = TypeVar("Result")


class Ended(Exception):
    """The process ended, or took too long, or our own code in it failed. `str(error)` says which.

    It is for the caller, who knows what was asked, to make a named error of it.
    """


class Isolated:
    """The other process. Not to be used by two threads at once."""

    def __init__(self, process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
        self._process, self._said = process, said

    def call(self, function: Callable[..., Result], *args: object, seconds: float | None = None) -> Result:
        """What `function(*args)` returns in the other process; a HandmillError arrives as it was raised there.

        Function, arguments and result must pickle. Raises Ended, also when it takes longer than `seconds`
        (DEADLINE_SECONDS unless given). Ctrl-C is heard.
        """
        overdue = threading.Event()

        def end() -> None:
            overdue.set()
            self._process.kill()

        seconds = DEADLINE_SECONDS if seconds is None else seconds
        deadline = threading.Timer(seconds, end)
        deadline.start()
        try:
            answer = run_interruptibly(lambda: self._ask(function, args), self._process.kill)
        except (EOFError, OSError, pickle.UnpicklingError):
            self._process.kill()
            code = self._process.wait()
            raise Ended(f"it took longer than {seconds:g} s" if overdue.is_set() else self._end(code)) from None
        finally:
            deadline.cancel()
            deadline.join()
        if isinstance(answer, (HandmillError, Ended)):
            raise answer
        result: Result = answer
        return result

    def _ask(self, function: Callable[..., Result], args: tuple[object, ...]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((function, args), self._process.stdin)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)  # our own process wrote it

    def _end(self, code: int) -> str:
        """How the process ended, and the last that was said in it: of llama.cpp, the condition that does not hold."""
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - _SAID_BYTES))
        lines = self._said.read().decode("utf-8", "replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "")
        try:
            how = signal.Signals(-code).name
        except ValueError:
            how = f"status {code}"
        return f"its process ended ({how}{': ' if said else ''}{printable(_PLACE.sub('', said))})"


@contextmanager
def isolation(*modules: str) -> Iterator[Isolated]:
    """Start a process, which imports `modules` while this one goes on. It does not outlive the block."""
    # -P: nothing beside the working directory is imported; what this process imports, the other finds
    command = [sys.executable, "-P", "-c", _CHILD, *modules]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "GGML_NO_BACKTRACE": "1",
    }
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
        ) as process,
    ):
        try:
            yield Isolated(process, said)
        finally:
            process.kill()
            with suppress(OSError):  # what a call that was cut off left to write
                assert process.stdin is not None
                process.stdin.close()


def serve() -> None:
    """What the other process does: a function and its arguments on stdin, its result or error on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who waits for this process, and ends it
    _leave_no_core()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed must not get between the answers
    with suppress(Exception):  # that shows when it is used
        for module in sys.argv[1:]:
            importlib.import_module(module)
        library()
    while True:
        try:
            function, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            os._exit(0)  # nothing is left to clean up, and freeing a large tokenizer takes time
        pickle.dump(_answer(function, args), answers)
        answers.flush()


def _answer(function: Callable[..., object], args: tuple[object, ...]) -> object:
    try:
        return function(*args)
    except HandmillError as error:
        return error
    except Exception as error:  # a fault of ours: it must not look like one of the file
        return Ended(f"{type(error).__name__}: {printable(error)}")


def _leave_no_core() -> None:
    with suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
