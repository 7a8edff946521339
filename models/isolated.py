"""Calls in a process of their own, for what a stranger's file or a device may end.

llama.cpp ends its process on some values of a file's metadata and on a device that is lost, and so may a parser: then
only this process ends, and the error has a name. It answers one call after the other. One serves a whole conversion:
it starts while the headers are read, lets llama.cpp look the model over, reads the tokenizer beside the encoding, and
checks the file. One serves a plan: it is asked about every placement that is considered. One is an engine: it answers
with the pieces of a reply.
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
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from queue import Empty, SimpleQueue
from typing import IO, Any, TypeVar

from models.errors import HandmillError
from models.text import printable

DEADLINE_SECONDS = 300
"""The largest tokenizers take a few seconds, a look at a large model less; what takes longer than this is made to."""
HINT = "A number in the model's config or metadata is wrong, such as that of its heads or experts, or a size."
_CHILD = "from models.isolated import serve; serve()"
_SAID_BYTES = 8192
_PLACE = re.compile(r"^\S*/(?=[^/]+:\d+: )")
"""The folder of a source file, at the head of what ggml says when it ends its process."""
_SLICE = 0.1
"""Seconds that are waited at a time: on Windows only a wait that ends lets Ctrl-C through."""

Result = TypeVar("Result")
_Call = tuple[int, Callable[..., object], tuple[object, ...]]
_TOLD, _BESIDE = -1, 0
"""In place of the number of a call."""


class Ended(Exception):
    """The process ended, or took too long, or our own code in it failed. `str(error)` says which.

    It is for the caller, who knows what was asked, to make a named error of it. `said` is the last that was said in
    the process.
    """

    def __init__(self, message: str, said: str = "") -> None:
        super().__init__(message)
        self.said = said


class Silent(Exception):
    """Nothing was heard within the time given; the process goes on."""


class Kind(Enum):
    """What the other process sends."""

    WORKING = auto()
    """It computes something, and so much of it."""
    PIECE = auto()
    """A part of the answer: what an iterator gave, or a call of `send`."""
    END = auto()
    """The answer, or the error that it ended with; the next call may follow."""


_Message = tuple[int, Kind, Any]


class Isolated:
    """The other process. One call at a time, and beside it, from any thread, what is done at once.

    `tell` may be used in a signal's handler, too.
    """

    def __init__(self, process: subprocess.Popen[bytes], said: IO[bytes] | None) -> None:
        self._process, self._said = process, said
        self._requests: SimpleQueue[bytes | None] = SimpleQueue()
        self._answers: SimpleQueue[_Message | None] = SimpleQueue()
        self._answers_beside: SimpleQueue[_Message | None] = SimpleQueue()
        self._beside = threading.Lock()
        self._number = 0
        for work in (self._write, self._read):
            threading.Thread(target=work, name=f"handmill{work.__name__}", daemon=True).start()

    def call(
        self,
        function: Callable[..., Result],
        *args: object,
        seconds: float | None = None,
        heard: Callable[[Any], None] = lambda piece: None,
    ) -> Result:
        """What `function(*args)` returns in the other process; a HandmillError arrives as it was raised there.

        Function, arguments and result must pickle. `heard` is given what the function sends before. Raises Ended,
        also when nothing comes for `seconds` (DEADLINE_SECONDS unless given). Ctrl-C is heard, and ends the process.
        """
        seconds = DEADLINE_SECONDS if seconds is None else seconds
        self.ask(function, *args)
        try:
            while True:
                kind, value = self.hear(seconds)
                if kind is Kind.END:
                    result: Result = value
                    return result
                if kind is Kind.PIECE:
                    heard(value)
        except Silent:
            self.kill()
            raise Ended(f"it took longer than {seconds:g} s", self._tail()) from None
        except (HandmillError, Ended):
            raise
        except BaseException:
            self.kill()
            raise

    def ask(self, function: Callable[..., object], *args: object) -> None:
        """Have `function(*args)` called; `hear` gives what comes of it, up to and with END.

        What of an earlier call was not heard yet never is.
        """
        request = pickle.dumps((self._number + 1, function, args))
        self._number += 1
        self._requests.put(request)

    def abandon(self) -> None:
        """Nothing more is wanted of the last call: an answer in pieces ends with the next one."""
        self.ask(_nothing)

    def beside(self, function: Callable[..., Result], *args: object, seconds: float | None = None) -> Result:
        """As `call`, but in another thread of the process, at once. Raises Ended."""
        with self._beside:
            seconds = DEADLINE_SECONDS if seconds is None else seconds
            self._requests.put(pickle.dumps((_BESIDE, function, args)))
            try:
                result: Result = _value(self._next(self._answers_beside, seconds))
                return result
            except Silent:
                self.kill()
                raise Ended(f"it took longer than {seconds:g} s", self._tail()) from None

    def tell(self, function: Callable[..., object], *args: object) -> None:
        """Have `function(*args)` called at once, beside what is computed; nothing comes of it."""
        self._requests.put(pickle.dumps((_TOLD, function, args)))

    def hear(self, seconds: float) -> tuple[Kind, Any]:
        """What comes next. Raises Silent after `seconds`, Ended, and the HandmillError that ended a call."""
        while True:
            message = self._next(self._answers, seconds)
            number, kind, _ = message
            if number == self._number:
                return kind, _value(message)

    def _next(self, answers: SimpleQueue[_Message | None], seconds: float) -> _Message:
        """Raises Silent and Ended. Time in which both processes were stopped (Ctrl-Z) does not count."""
        left = seconds
        while True:
            try:
                message = answers.get(timeout=min(left, _SLICE))
                break
            except Empty:
                left -= _SLICE
                if left <= 0:
                    raise Silent from None
        if message is None:
            answers.put(None)  # for whoever asks again
            raise self._ended()
        return message

    def kill(self) -> None:
        self._process.kill()

    def _write(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # that it has ended shows in what it answers
            while request := self._requests.get():
                self._process.stdin.write(request)
                self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with suppress(EOFError, OSError, ValueError, pickle.UnpicklingError):
            while True:
                message: _Message = pickle.load(self._process.stdout)  # our own process wrote it
                (self._answers_beside if message[0] == _BESIDE else self._answers).put(message)
        self._answers.put(None)
        self._answers_beside.put(None)

    def _ended(self) -> Ended:
        """How the process ended, and the last that was said in it: of llama.cpp, the condition that does not hold."""
        self.kill()
        code = self._process.wait()
        self._requests.put(None)
        tail = self._tail()
        said = next((line for line in reversed(tail.split("\n")) if line.strip()), "")
        try:
            how = signal.Signals(-code).name
        except ValueError:
            how = f"status {code}"
        return Ended(f"its process ended ({how}{': ' if said else ''}{printable(_PLACE.sub('', said))})", tail)

    def _tail(self) -> str:
        if self._said is None or self._said.closed:
            return ""
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - _SAID_BYTES))
        return self._said.read().decode("utf-8", "replace")


def _value(message: _Message) -> Any:
    _, kind, value = message
    if kind is Kind.END and isinstance(value, (HandmillError, Ended)):
        raise value
    return value


def _nothing() -> None: ...


@contextmanager
def isolation(*modules: str, loud: bool = False) -> Iterator[Isolated]:
    """Start a process, which imports `modules` while this one goes on. It does not outlive the block, nor this one.

    If `loud`, what is said in it goes to this one's stderr, and no error quotes it.
    """
    # -P: nothing beside the working directory is imported; what this process imports, the other finds
    command = [sys.executable, "-P", "-c", _CHILD, *modules]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "GGML_NO_BACKTRACE": "1",
    }
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if loud else said,
        ) as process,
    ):
        apart = Isolated(process, None if loud else said)
        try:
            yield apart
        finally:
            process.kill()
            apart._requests.put(None)
            with suppress(OSError):  # what a call that was cut off left to write
                assert process.stdin is not None
                process.stdin.close()


_answers: IO[bytes] | None = None
_sending = threading.Lock()
_number = _newest = 0


def serve() -> None:
    """What the other process does: calls come on stdin, what comes of them goes to stdout."""
    global _answers, _number
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who waits for this process, and ends it
    _leave_no_core()
    _answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed must not get between the answers
    with suppress(Exception):  # that shows when it is used
        for module in sys.argv[1:]:
            importlib.import_module(module)
        from models.native import library

        library()
    calls: SimpleQueue[_Call] = SimpleQueue()
    threading.Thread(target=_listen, args=[calls], daemon=True).start()
    while True:
        _number, function, args = calls.get()
        if _number == _newest:
            _put(Kind.END, _answer(function, args), _number)


def send(piece: object) -> None:
    """In a call in the process of its own: give this to who waits for the answer. Elsewhere nothing happens."""
    if _answers is not None:
        _put(Kind.PIECE, piece, _number)


def announce(work: int) -> None:
    """The same: `work` units of something come next, and until they are done nothing is heard."""
    if _answers is not None:
        _put(Kind.WORKING, work, _number)


def _put(kind: Kind, value: object, number: int) -> None:
    assert _answers is not None
    with _sending:
        pickle.dump((number, kind, value), _answers, pickle.HIGHEST_PROTOCOL)
        _answers.flush()


def _listen(calls: SimpleQueue[_Call]) -> None:
    global _newest
    try:
        while True:
            number, function, args = pickle.load(sys.stdin.buffer)
            if number == _BESIDE:
                _put(Kind.END, _answer(function, args), number)
            elif number == _TOLD:
                function(*args)
            else:
                _newest = number
                calls.put((number, function, args))
    except EOFError:
        os._exit(0)  # nothing is left to clean up, and freeing a large tokenizer takes time
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _answer(function: Callable[..., object], args: tuple[object, ...]) -> object:
    try:
        result = function(*args)
        if not isinstance(result, Iterator):
            return result
        for piece in result:
            send(piece)
            if _number != _newest:  # nobody listens any more
                break
        return None
    except HandmillError as error:
        return error
    except Exception as error:  # a fault of ours: it must not look like one of the file
        return Ended(f"{type(error).__name__}: {printable(error)}")


def _leave_no_core() -> None:
    with suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
