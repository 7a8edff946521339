"""What the set-up scripts say, all of it on stderr: stdout belongs to the program that `make` opens at the end."""

from __future__ import annotations

import sys
import time


class SetupError(Exception):
    """Setting up cannot go on; the message says why, and what mends it."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Progress:
    """How far a long step is: one line that changes on a terminal, else a line every tenth of the way."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._started = time.monotonic()
        self._live = sys.stderr.isatty()
        self._tenth = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def show(self, done: int, total: int) -> None:
        elapsed = time.monotonic() - self._started
        text = f"  {self._verb} {done} of {total}, {elapsed // 60:.0f} min {elapsed % 60:02.0f} s"
        if self._live:
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
        elif done * 10 // total > self._tenth:
            self._tenth = done * 10 // total
            say(text)
