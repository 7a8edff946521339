"""How fast memory is read, of this machine and of each device: what bounds the generation of tokens."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from models import native
from models.errors import LoadError
from models.gguf_types import TENSOR_TYPES
from models.text import human_bytes
from runner import devices
from runner.engine.memory import available_memory
from runner.placement import CPU

_BYTES = 256 << 20
"""More than any cache holds."""
_LEAST_BYTES = 64 << 20
"""With less, a cache would be measured."""
_SENT = (1 << 18, 1 << 21)
"""Over a network: the second only where the first came at once. A fifth of a second at ten megabytes a second."""
_ROUNDS, _MOST_ROUNDS = 4, 50
_SECONDS = 0.3
"""Further rounds are made within it: another program may get in the way of some."""
_WIDTH = 4096
"""Weights in a row, and rows in a matrix, of what a device multiplies: as in a model of seven billion weights."""


def memory_bandwidth(threads: int) -> float | None:
    """Bytes per second that `threads` read together, the best of some rounds; a fraction of a second in all.

    None where there is no memory to measure with.
    """
    size = _sample_bytes()
    if size < _LEAST_BYTES:
        return None
    libc = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
    # memchr is the C library's own vectorised read: it looks for a byte that is not there.
    libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.memchr.restype = ctypes.c_void_p
    try:
        memory = np.ones(size, np.uint8)
    except MemoryError:
        return None
    share = size // threads
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            list(pool.map(lambda i: libc.memchr(memory.ctypes.data + i * share, 0, share), range(threads)))
            best = max(best, threads * share / (time.perf_counter() - began))
    return best


def _sample_bytes() -> int:
    """How much of this machine's memory to measure with: a quarter of what is left at most."""
    available = available_memory()
    return _BYTES if available is None else min(_BYTES, available // 4)


@dataclass(frozen=True)
class DeviceSpeed:
    """What it takes a device to compute: bytes of weights read per second, and seconds for a call with next to none.

    A call is what one token costs of a device beside its weights: over a network, most of all the way there and back.
    """

    bytes_per_second: float
    seconds_per_call: float
    link_bytes_per_second: float | None = None
    """Of a device of another machine: how fast it is sent something."""

    def seconds_for(self, weights: float, sent: float = 0.0) -> float:
        """For a token that reads so many bytes of weights there, and that many cross a network for."""
        return weights / self.bytes_per_second + self.link_seconds(sent)

    def link_seconds(self, sent: float) -> float:
        return self.seconds_per_call + (sent / self.link_bytes_per_second if self.link_bytes_per_second else 0.0)


def device_speed(device: str, tensor_type: str = "F16", threads: int | None = None) -> DeviceSpeed:
    """How fast `device` multiplies weights of `tensor_type` with one token's activations, by ggml's own code for it.

    A fraction of a second in all; of a CPU with so many `threads`. A device that is lost ends the process. Raises
    LoadError where it has no memory for it, or no such product.
    """
    number, block, block_bytes = next(
        (number, block, size) for number, (name, block, size) in TENSOR_TYPES.items() if name == tensor_type
    )
    matrix = _WIDTH * _WIDTH // block * block_bytes
    size = _sample_bytes() if device == CPU else _BYTES
    if size < _LEAST_BYTES:
        raise LoadError(f"{device} has no {human_bytes(_LEAST_BYTES)} free to measure with", device=device)
    count = max(1, size // matrix)
    call = _multiply_seconds(device, number, 1, block, threads)
    whole = _multiply_seconds(device, number, count, _WIDTH, threads)
    link = _link_speed(device) if devices.is_elsewhere(device) else None
    return DeviceSpeed(count * matrix / max(whole - call, whole / 2), call, link)


def _link_speed(device: str) -> float:
    """Bytes per second that reach a device of another machine, the best of some rounds."""
    base, most = _base(), max(_SENT)
    with _backend(device, 4 * 1024) as (context, backend):
        tensor = base.ggml_new_tensor_2d(context, 0, most // 4, 1)
        with _allocated(device, context, backend, most):
            data, speed, a_number = np.ones(most, np.uint8), 0.0, ctypes.c_float()
            end = time.perf_counter() + _SECONDS
            for size in (size for size in _SENT for _ in range(_ROUNDS)):
                began = time.perf_counter()
                if speed and began > end:
                    break
                base.ggml_backend_tensor_set(tensor, data.ctypes.data, 0, size)
                base.ggml_backend_tensor_get(tensor, ctypes.byref(a_number), 0, 4)  # asked for last, so all has come
                speed = max(speed, size / (time.perf_counter() - began))
            return speed


def _multiply_seconds(device: str, number: int, count: int, rows: int, threads: int | None) -> float:
    """Seconds to multiply `count` matrices of `rows` rows, the best of some rounds."""
    base = _base()
    with _backend(device, base.ggml_graph_overhead() + (3 * count + 8) * 1024) as (context, backend):
        activations = base.ggml_new_tensor_2d(context, 0, _WIDTH, 1)
        graph = base.ggml_new_graph(context)
        for _ in range(count):
            weights = base.ggml_new_tensor_2d(context, number, _WIDTH, rows)
            product = base.ggml_mul_mat(context, weights, activations)
            base.ggml_build_forward_expand(graph, product)
        if not base.ggml_backend_supports_op(backend, product):
            raise LoadError(f"{device} does not multiply weights of this type", device=device)
        with _allocated(device, context, backend, _BYTES) as buffer:
            base.ggml_backend_buffer_clear(buffer, 0)
            _set_threads(device, backend, threads)
            best, a_number = float("inf"), ctypes.c_float()
            rounds, end = 0, time.perf_counter() + _SECONDS
            while rounds < _ROUNDS or (time.perf_counter() < end and rounds < _MOST_ROUNDS):
                rounds, began = rounds + 1, time.perf_counter()
                if base.ggml_backend_graph_compute(backend, graph) != 0:
                    raise LoadError(f"{device} failed to multiply", device=device)
                # Computing may go on after the call; a device asked for a number of the result has it then.
                base.ggml_backend_tensor_get(product, ctypes.byref(a_number), 0, 4)
                best = min(best, time.perf_counter() - began)
            return best


@contextmanager
def _backend(device: str, size: int) -> Iterator[tuple[Any, Any]]:
    """A ggml context with room to describe tensors and graphs in `size` bytes, without data; and the backend."""
    base = _base()
    context = base.ggml_init(_InitParams(size, None, True))
    backend = base.ggml_backend_dev_init(devices.pointer_of(device), None)
    try:
        if not backend:
            raise LoadError(f"{device} cannot be used", device=device)
        yield context, backend
    finally:
        if backend:
            base.ggml_backend_free(backend)
        base.ggml_free(context)


@contextmanager
def _allocated(device: str, context: Any, backend: Any, nbytes: int) -> Iterator[Any]:
    """The buffer of all tensors of a context, about `nbytes` large. Raises LoadError."""
    base = _base()
    buffer = base.ggml_backend_alloc_ctx_tensors(context, backend)
    if not buffer:
        raise LoadError(f"{device} has no {human_bytes(nbytes)} free to measure with", device=device)
    try:
        yield buffer
    finally:
        base.ggml_backend_buffer_free(buffer)


class _InitParams(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def _set_threads(device: str, backend: int, threads: int | None) -> None:
    base = _base()
    registry = base.ggml_backend_dev_backend_reg(devices.pointer_of(device))
    address = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
    if threads and address:  # a CPU has it, a GPU has not
        ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)(backend, threads)


def _base() -> ctypes.CDLL:
    lib = native.shared_library("ggml-base")
    p, i, n = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    functions = {
        "ggml_init": (p, _InitParams),
        "ggml_free": (None, p),
        "ggml_graph_overhead": (ctypes.c_size_t,),
        "ggml_new_graph": (p, p),
        "ggml_new_tensor_2d": (p, p, i, n, n),
        "ggml_mul_mat": (p, p, p, p),
        "ggml_build_forward_expand": (None, p, p),
        "ggml_backend_dev_init": (p, p, ctypes.c_char_p),
        "ggml_backend_dev_backend_reg": (p, p),
        "ggml_backend_reg_get_proc_address": (p, p, ctypes.c_char_p),
        "ggml_backend_supports_op": (ctypes.c_bool, p, p),
        "ggml_backend_alloc_ctx_tensors": (p, p, p),
        "ggml_backend_buffer_clear": (None, p, ctypes.c_uint8),
        "ggml_backend_graph_compute": (i, p, p),
        "ggml_backend_tensor_get": (None, p, p, ctypes.c_size_t, ctypes.c_size_t),
        "ggml_backend_tensor_set": (None, p, p, ctypes.c_size_t, ctypes.c_size_t),
        "ggml_backend_buffer_free": (None, p),
        "ggml_backend_free": (None, p),
    }
    for name, (result, *arguments) in functions.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
