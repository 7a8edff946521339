"""One line on the terminal that says how far a long step is. Written to stderr, and only where that is a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable

from models.text import printable

_SECONDS_BETWEEN = 0.1
_BAR = 20


class ProgressLine:
    """`with ProgressLine(quiet) as line: line.show("fetching x", done, total, human_bytes)`.

    The line is gone when the block ends: what remains of a step is its result.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._on = not quiet and sys.stderr.isatty()
        self._what = ""
        self._started = self._drawn = 0.0
        self._first = 0

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._on and self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def show(self, what: str, done: float, total: float, unit: Callable[[float], str] | None = None) -> None:
        """Draw, at most ten times a second. With a `unit` (such as human_bytes) also the rate and the time left."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._started, self._first, self._drawn = what, now, int(done), 0.0
        if not self._on or (now - self._drawn < _SECONDS_BETWEEN and done < total):
            return
        self._drawn = now
        share = min(1.0, done / total) if total else 0.0
        filled = round(share * _BAR)
        text = f"{printable(what, 40)}  {'█' * filled}{'░' * (_BAR - filled)} {share:4.0%}"
        if unit is not None:
            text += f"  {unit(done)} of {unit(total)}"
            seconds = now - self._started
            if seconds > 1 and (rate := (done - self._first) / seconds) > 0:
                text += f"  {unit(rate)}/s  {_clock((total - done) / rate)} left"
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r{text[:width]}\x1b[K")
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02}"
    )
