"""Ctrl-C while llama.cpp computes in the main thread.

Python runs the handler of a signal only when C code has come back, which may take minutes here. But the interpreter
writes to a file descriptor at once, and a thread that reads there can raise the abort flag. Computing in another
thread and waiting for it would do as well, were it not for OpenMP: as soon as two threads have computed, libgomp has
more threads than there are processors, and no longer lets them spin between two operations. Every token then takes a
fifth longer.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

_STOPPING = [number for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if (number := getattr(signal, name, None))]


class _Listener:
    """Hears of signals while C code runs, in a thread of its own."""

    def __init__(self) -> None:
        self.abort: Callable[[], None] | None = None
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        threading.Thread(target=self._listen, name="handmill-signals", daemon=True).start()

    def fileno(self) -> int:
        return self._sender.fileno()

    def _listen(self) -> None:
        while numbers := self._receiver.recv(64):
            if (abort := self.abort) is not None and not set(numbers).isdisjoint(_STOPPING):
                abort()


_listener = cache(_Listener)


@contextmanager
def aborting(abort: Callable[[], None]) -> Iterator[None]:
    """Have `abort` called as soon as a signal comes that asks to stop. Its own handler runs at the end of the block.

    Not before: in a callback from C, such as llama.cpp's log, an exception of the handler would be lost.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are not for this one
        yield
        return
    listener, came = _listener(), list[int]()
    handlers = {number: handler for number in _STOPPING if callable(handler := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda number, frame: came.append(number))
    listener.abort = abort
    other = signal.set_wakeup_fd(listener.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(other)
        listener.abort = None
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            if other != -1:  # an event loop waits there
                with suppress(OSError):
                    os.write(other, bytes([number]))
            handlers[number](number, None)
