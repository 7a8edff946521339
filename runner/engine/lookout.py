"""Whether workers still answer, asked beside what is computed with them: one that is slow does, one that hangs not."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from models.errors import LoadError
from runner.rpc import InUse, greet

_ANSWER_SECONDS = 1.0
_PAUSE = 0.5
_LOST_AFTER = 4.0
"""Seconds without an answer: a machine that is very busy may be late."""


class Lookout:
    """Asks when it is woken, in a thread of its own.

    Only a worker of ours tells a second client that it is in use. Of another server nothing is known, nor of one that
    never said so.
    """

    def __init__(self, endpoints: Sequence[str]) -> None:
        self._endpoints = endpoints
        self._answers: set[str] = set()
        self._silent_since: dict[str, float] = {}
        self._woken = threading.Event()
        self._ended = False
        if endpoints:
            threading.Thread(target=self._watch, name="handmill-lookout", daemon=True).start()

    def wake(self) -> None:
        self._woken.set()

    def lost(self) -> str | None:
        """A worker that answered before, and now has not for some seconds."""
        now = time.monotonic()
        return next((e for e, since in list(self._silent_since.items()) if now - since > _LOST_AFTER), None)

    def close(self) -> None:
        self._ended = True
        self.wake()

    def _watch(self) -> None:
        while self._woken.wait() and not self._ended:
            self._woken.clear()
            for endpoint in self._endpoints:
                self._look(endpoint)
            time.sleep(_PAUSE)

    def _look(self, endpoint: str) -> None:
        began = time.monotonic()
        try:
            greet(endpoint, _ANSWER_SECONDS)
        except InUse:
            self._answers.add(endpoint)
        except LoadError:
            if endpoint in self._answers:
                self._silent_since.setdefault(endpoint, began)
            return
        self._silent_since.pop(endpoint, None)


def is_alive(endpoint: str) -> bool:
    """Whether a worker answers, if only that it serves somebody else."""
    try:
        greet(endpoint, _ANSWER_SECONDS)
    except InUse:
        return True
    except LoadError:
        return False
    return True
