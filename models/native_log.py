"""llama.cpp's log: captured by line, cleaned, shown only when asked for."""

from __future__ import annotations

import re
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_LEVEL_ERROR, _LEVEL_CONTINUED = 4, 5  # GGML_LOG_LEVEL_*
_KEPT_LINES = 4000


class LogTail:
    """What llama.cpp logged inside `capture_log()`: whole lines, oldest first, bounded in number."""

    def __init__(self, only: re.Pattern[str] | None = None) -> None:
        self._only = only
        self._lines: deque[tuple[int, str]] = deque(maxlen=_KEPT_LINES)

    @property
    def lines(self) -> list[str]:
        return [text for _, text in self._lines.copy()]

    def tail(self, n: int = 5) -> list[str]:
        """The last `n` lines."""
        return self.lines[-n:]

    def problems(self, n: int = 3) -> list[str]:
        """The last `n` error lines; where llama.cpp marked none as an error, its last lines."""
        errors = [text for level, text in self._lines.copy() if level == _LEVEL_ERROR]
        return errors[-n:] or self.tail(n)

    def _add(self, level: int, text: str) -> None:
        if self._only is None or self._only.search(text):
            self._lines.append((level, text))


class Log:
    """Receives llama.cpp's log from any thread, joins its chunks to lines and hands them to who listens."""

    def __init__(self) -> None:
        self.listeners: list[LogTail] = []
        self.verbose = False
        self._lock = threading.Lock()
        self._level = 0
        self._partial = ""

    def write(self, level: int, text: bytes | None, _user_data: object) -> None:
        chunk = (text or b"").decode("utf-8", "replace")
        with self._lock:
            if level != _LEVEL_CONTINUED:
                self._flush()
                self._level = level
            *whole, self._partial = (self._partial + chunk).split("\n")
            for line in whole:
                self._emit(line)

    def flush(self) -> None:
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        if self._partial:
            self._emit(self._partial)
            self._partial = ""

    def _emit(self, line: str) -> None:
        # The log quotes strings of the file: what could steer a terminal does not get past this line.
        line = "".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in line)
        for listener in self.listeners:
            listener._add(self._level, line)
        if self.verbose:
            print(line, file=sys.stderr)


LOG = Log()


def set_verbose(verbose: bool) -> None:
    """Whether llama.cpp's log also goes to stderr."""
    LOG.verbose = verbose


@contextmanager
def capture_log(only: re.Pattern[str] | None = None) -> Iterator[LogTail]:
    """Collect llama.cpp's log, or of it the lines in which `only` is found.

    It is one for the whole process: lines of other threads come along.
    """
    tail = LogTail(only)
    LOG.listeners = [*LOG.listeners, tail]
    try:
        yield tail
    finally:
        LOG.flush()
        LOG.listeners = [other for other in LOG.listeners if other is not tail]
