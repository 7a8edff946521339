"""How fast memory is read, of this machine and of each device: what bounds the generation of tokens."""

from __future__ import annotations

import ctypes
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from models import native
from models.errors import LoadError
from models.gguf_types import TENSOR_TYPES
from runner import devices

_BYTES = 256 << 20
"""More than any cache holds."""
_ROUNDS = 4
_WIDTH = 4096
"""Weights in a row, and rows in a matrix, of what a device multiplies: as in a model of seven billion weights."""


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


def multiply_rate(device: str, tensor_type: str = "F16", threads: int | None = None) -> float:
    """Bytes of weights per second that `device` reads while it multiplies them with one token's activations.

    What generating a token does, by ggml's own code for weights of `tensor_type`; a fraction of a second in all. Of a
    CPU by as many `threads`. A device that is lost ends the process. Raises LoadError where it has no memory for it.
    """
    number = next(number for number, (name, *_) in TENSOR_TYPES.items() if name == tensor_type)
    _, block, block_bytes = TENSOR_TYPES[number]
    matrix = _WIDTH * _WIDTH // block * block_bytes
    count = max(1, _BYTES // matrix)
    base, pointer = _base(), devices.pointer_of(device)
    # Room for the graph and what describes its tensors; no data.
    context = base.ggml_init(_InitParams(base.ggml_graph_overhead() + (3 * count + 8) * 1024, None, True))
    backend = base.ggml_backend_dev_init(pointer, None)
    buffer = None
    try:
        activations = base.ggml_new_tensor_2d(context, 0, _WIDTH, 1)
        graph = base.ggml_new_graph(context)
        for _ in range(count):
            weights = base.ggml_new_tensor_2d(context, number, _WIDTH, _WIDTH)
            product = base.ggml_mul_mat(context, weights, activations)
            base.ggml_build_forward_expand(graph, product)
        buffer = base.ggml_backend_alloc_ctx_tensors(context, backend) if backend else None
        if not buffer:
            raise LoadError(f"{device} has no {count * matrix} bytes free to measure with", device=device)
        base.ggml_backend_buffer_clear(buffer, 0)
        _set_threads(pointer, backend, threads)
        best, a_number = 0.0, ctypes.c_float()
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            if base.ggml_backend_graph_compute(backend, graph) != 0:
                raise LoadError(f"{device} does not multiply weights of the type {tensor_type}", device=device)
            # Computing may go on after the call; a device asked for a number of the result has it then.
            base.ggml_backend_tensor_get(product, ctypes.byref(a_number), 0, 4)
            best = max(best, count * matrix / (time.perf_counter() - began))
        return best
    finally:
        if buffer:
            base.ggml_backend_buffer_free(buffer)
        if backend:
            base.ggml_backend_free(backend)
        base.ggml_free(context)


class _InitParams(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def _set_threads(pointer: int, backend: int, threads: int | None) -> None:
    base = _base()
    registry = base.ggml_backend_dev_backend_reg(pointer)
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
        "ggml_backend_alloc_ctx_tensors": (p, p, p),
        "ggml_backend_buffer_clear": (None, p, ctypes.c_uint8),
        "ggml_backend_graph_compute": (i, p, p),
        "ggml_backend_tensor_get": (None, p, p, ctypes.c_size_t, ctypes.c_size_t),
        "ggml_backend_buffer_free": (None, p),
        "ggml_backend_free": (None, p),
    }
    for name, (result, *arguments) in functions.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
