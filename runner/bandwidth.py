"""How fast this machine reads its memory: what bounds the generation of tokens on a CPU."""

from __future__ import annotations

import ctypes
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_BYTES = 256 << 20
"""More than any cache holds."""
_ROUNDS = 4


def memory_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` read together, the best of some rounds; a fraction of a second in all."""
    libc = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
    # memchr is the C library's own vectorised read: it looks for a byte that is not there.
    libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.memchr.restype = ctypes.c_void_p
    memory = np.ones(_BYTES, np.uint8)
    share = _BYTES // threads
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            list(pool.map(lambda i: libc.memchr(memory.ctypes.data + i * share, 0, share), range(threads)))
            best = max(best, threads * share / (time.perf_counter() - began))
    return best
