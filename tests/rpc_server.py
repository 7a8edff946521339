"""A llama.cpp RPC server of this machine's CPU in a process of its own: a real offload device without a GPU."""

from __future__ import annotations

import ctypes
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def rpc_server(memory: int | None = None) -> Iterator[str]:
    """Its `host:port`; see `rpc_process`."""
    with rpc_process(memory) as (endpoint, _):
        yield endpoint


@contextmanager
def rpc_process(memory: int | None = None) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Its `host:port`, and the process. With `memory`, allocations beyond that many bytes of addresses fail there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, __file__, endpoint, str(memory or 0)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Threads and their arenas take address space too, and a server that has none left for them crashes.
        env={**os.environ, "MALLOC_ARENA_MAX": "1"} if memory else None,
    )
    try:
        for _ in range(600):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "the RPC server ended"
            time.sleep(0.05)
        else:
            raise AssertionError("the RPC server does not listen")
        yield endpoint, server
    finally:
        server.kill()
        server.wait()


def serve(endpoint: str, memory: int) -> None:
    from models import native

    ggml, rpc = native.shared_library("ggml"), native.shared_library("ggml-rpc")
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    cpu = (ctypes.c_void_p * 1)(ggml.ggml_backend_dev_by_type(0))
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + memory, resource.RLIM_INFINITY))
    rpc.ggml_backend_rpc_start_server.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_void_p,
    ]
    rpc.ggml_backend_rpc_start_server(endpoint.encode(), None, 1, 1, cpu)


def _address_space() -> int:
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    sys.path[0:0] = [__file__.rsplit("/", 2)[0]]
    serve(sys.argv[1], int(sys.argv[2]))
