"""Lending this machine's devices: llama.cpp's RPC server, and what it lacks. `runner.rpc` is the side that borrows.

The server blocks for ever, so it has a process of its own (`models.isolated`), which threads of ours share with it:
one tells a second client that the server is taken, one keeps the cache of weights within its size. What a device
reports as free is what is lent of it.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import native
from models.errors import LoadError, UsageError
from models.isolated import send
from models.text import human_bytes, printable
from runner import devices
from runner.engine.memory import available_memory, taken_addresses
from runner.rpc import BUSY
from runner.worker_cache import forget_what_is_cut, keep_cache

_MOST_HEADROOM = 1 << 30
_LOOKS, _LOOK_SECONDS = 5, 0.02
_CLIENT_SECONDS = 2.0
_kept_alive: list[Any] = []


@dataclass(frozen=True)
class Lent:
    """What a worker lends, and where."""

    host: str
    """An IPv4 address."""
    port: int
    device: str | None = None
    """Its name; None for the GPUs, or the CPU where there are none."""
    memory: int | None = None
    """Bytes of each device that clients may take at most."""
    threads: int = 1
    cache: Path | None = None
    cache_bytes: int = 0


def serve(lent: Lent) -> None:
    """Lend until the process ends. Raises UsageError, LoadError.

    Sends a line of what is lent as soon as clients may come.
    """
    chosen = _choose(lent.device)
    _check_free(lent.host, lent.port)
    for device in chosen:
        _report_what_is_lent(device, lent.memory)
    if lent.cache is not None:
        _open_cache(lent.cache)
        threading.Thread(target=keep_cache, args=[lent.cache, lent.cache_bytes], daemon=True).start()
    threading.Thread(target=_attend, args=[lent, chosen], daemon=True).start()
    if all(device.kind == "cpu" for device in chosen):
        _limit_addresses(lent.memory)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the server prints a line for each client
    _start_server(lent, chosen)
    raise LoadError(f"llama.cpp's RPC server does not start at {lent.host}:{lent.port}")


def _open_cache(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        forget_what_is_cut(folder)
    except OSError as error:
        raise UsageError(
            f"{printable(folder)} cannot be used: {printable(error.strerror or error)}",
            hint="HANDMILL_HOME names another folder; --cache off does without.",
        ) from error


def _choose(name: str | None) -> list[devices.Device]:
    found = [device for device in devices.devices() if device.backend != "RPC"]
    if name is None:
        return devices.offload_devices(found) or [device for device in found if device.kind == "cpu"]
    chosen = [device for device in found if device.name.lower() == name.lower()]
    if not chosen:
        there = ", ".join(printable(device.name) for device in found)
        raise UsageError(f"there is no device {printable(name, 80)!r}", hint=f"There are: {there}")
    return chosen


def _check_free(host: str, port: int) -> None:
    """llama.cpp's server says nothing of an address that it cannot have."""
    with socket.socket() as probe:
        if sys.platform != "win32":  # there it would let two servers share a port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise UsageError(
                f"nothing can listen at {host}:{port}: {printable(error.strerror or error)}",
                hint="Another worker may run there. --listen takes another HOST:PORT; with port 0 any that is free.",
            ) from error


def _start_server(lent: Lent, chosen: Sequence[devices.Device]) -> None:
    try:
        rpc = native.shared_library("ggml-rpc")
    except LoadError as error:
        raise LoadError("this build of llama.cpp has no RPC backend", hint=devices.rebuild_command()) from error
    start = rpc.ggml_backend_rpc_start_server
    start.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
    start.restype = None
    pointers = (ctypes.c_void_p * len(chosen))(*(devices.pointer_of(device.name) for device in chosen))
    cache = None if lent.cache is None else os.fsencode(lent.cache)
    start(f"{lent.host}:{lent.port}".encode(), cache, lent.threads, len(chosen), pointers)


# Memory


def _headroom(size: int) -> int:
    """What of so many bytes is not lent: a tensor that arrives is held a second time."""
    return min(_MOST_HEADROOM, size // 4)


def _limit_addresses(memory: int | None) -> None:
    """Have allocations fail beyond `memory` bytes: of a CPU's memory nothing else says no."""
    if memory is None:
        return
    if (taken := taken_addresses()) is None:
        send("this system sets no limit of this kind: --memory changes only what clients are told")
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = taken + memory if hard == resource.RLIM_INFINITY else min(taken + memory, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


class _Interface(ctypes.Structure):
    """The beginning of `ggml_backend_device` (ggml-backend-impl.h): functions of the device."""

    _fields_ = [("get_name", ctypes.c_void_p), ("get_description", ctypes.c_void_p), ("get_memory", ctypes.c_void_p)]


_GetName = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)
_GetMemory = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t))


def _report_what_is_lent(device: devices.Device, memory: int | None) -> None:
    """Let `ggml_backend_dev_memory` of the device say what clients may take of it.

    ggml gives all of a machine's memory as free for its CPU, whatever is taken of it, and knows no cap.
    """
    pointer = devices.pointer_of(device.name)
    interface = _Interface.from_address(pointer)
    if _GetName(interface.get_name or 0)(pointer) != device.name.encode():
        raise LoadError(f"this build of llama.cpp has devices of another layout, so {device.name} cannot be lent")
    original = _GetMemory(interface.get_memory)
    at_first = device.free

    def get_memory(pointer: int, free: Any, total: Any) -> None:
        original(pointer, free, total)
        left = free[0]
        if device.kind == "cpu":
            available = available_memory()
            left = left if available is None else min(left, available)
            left -= _headroom(left if memory is None else memory)
        if memory is not None:
            left = min(left, memory - max(0, at_first - free[0]))
            total[0] = min(total[0], memory)
        free[0] = max(0, left)

    replaced = _GetMemory(get_memory)
    _kept_alive.append(replaced)
    interface.get_memory = ctypes.cast(replaced, ctypes.c_void_p).value


# Clients


def _attend(lent: Lent, chosen: Sequence[devices.Device]) -> None:
    """Say when clients may come, and turn a second one away while the first is served."""
    listening = None
    while listening is None:
        time.sleep(0.02)
        listening = next((found.dup() for found in _sockets(lent.port) if _listens(found)), None)
    what = ", ".join(f"{device.name} ({human_bytes(devices.free_memory(device.name))})" for device in chosen)
    send(f"lending {what} at {lent.host}:{lent.port}")
    if sys.platform == "win32":
        return  # sockets cannot be listed there: a second client waits
    while True:
        waits = select.select([listening], [], [], _CLIENT_SECONDS)[0]
        for served in filter(_is_connected, _sockets(lent.port)):
            _notice_when_gone(served)
        if not waits or not _stays_waiting(listening, lent.port):
            continue  # nobody, or the server took it
        client, _ = listening.accept()
        with client, suppress(OSError):
            client.settimeout(0.5)
            client.recv(64)  # what is unread when a connection ends takes the answer with it
            client.sendall(BUSY)
            client.shutdown(socket.SHUT_WR)


def _notice_when_gone(client: socket.socket) -> None:
    """Have the system ask now and then whether the other machine is still there: else it would be served for ever."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # macOS calls the first one otherwise
            client.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _stays_waiting(listening: socket.socket, port: int) -> bool:
    """Whether a client goes on waiting because another is served, who has not just left."""
    for _ in range(_LOOKS):
        time.sleep(_LOOK_SECONDS)
        if not select.select([listening], [], [], 0)[0] or not any(_is_connected(s) for s in _sockets(port)):
            return False
    return True


def _sockets(port: int) -> Iterator[socket.socket]:
    """The sockets of this process at `port`, each until the next: llama.cpp gives none of its own away.

    A connection lasts as long as somebody has it open.
    """
    if sys.platform == "win32":
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as found:
            yield found
        return
    for entry in Path("/dev/fd").iterdir():
        with suppress(OSError, ValueError):
            if stat.S_ISSOCK(os.fstat(int(entry.name)).st_mode):
                with socket.socket(fileno=os.dup(int(entry.name))) as found:
                    if found.family == socket.AF_INET and found.getsockname()[1] == port:
                        yield found


def _listens(found: socket.socket) -> bool:
    return sys.platform == "win32" or bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _is_connected(found: socket.socket) -> bool:
    try:
        found.getpeername()
    except OSError:
        return False
    return True
