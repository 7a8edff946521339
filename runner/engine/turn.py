"""Whose turn it is to generate."""

from __future__ import annotations

import threading

from models.errors import GenerationError


class Turn:
    """One at a time, and whoever comes second waits or is refused."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def check_free(self) -> None:
        """Raises GenerationError."""
        if self._lock.locked():
            raise GenerationError("a reply is still being generated", hint="Exhaust or close its iterator first.")

    def taken(self, *, wait: bool) -> Turn:
        """To be used in a `with` statement. Raises GenerationError, where it does not `wait` and another has it."""
        # A thread that waited for itself would wait for ever.
        may_wait = wait and self._owner != threading.get_ident()
        while not self._lock.acquire(timeout=0.2 if may_wait else 0):
            if not may_wait:
                self.check_free()
        self._owner = threading.get_ident()
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._owner = None
        self._lock.release()
