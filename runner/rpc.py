"""Other machines' devices, over llama.cpp's RPC: the side that uses them. `runner.worker` is the one that lends.

llama.cpp ends its process where a server is away or of another version, and waits for ever for one that is stopped or
serves somebody else. So a server is greeted here first, in Python, and what is wrong has a name.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

from models import native
from models.errors import LoadError
from models.text import printable

DEFAULT_PORT = 50052
PROTOCOL = 7
"""RPC_PROTO_MAJOR_VERSION of the llama.cpp that is installed (ggml-rpc.h); a test holds them equal."""
BUSY = b"handmill: in use\n"
"""What a worker of ours tells a second client before it hangs up."""
_HELLO = struct.pack("<BQ24x", 14, 24)
"""RPC_CMD_HELLO, the size of what follows, and no capabilities (ggml-rpc.cpp, rpc_msg_hello_req)."""
_REPLY = struct.Struct("<QBBBx24x")
_SECONDS = 3.0
_LEAVE_SECONDS = 1.0
_TRIES, _PAUSE = 3, 0.2
"""A server that was just left may not have noticed yet."""
_SAME_PLACE = 0.001
"""Seconds of round trip under which two servers count as equally near."""

_endpoints: list[str] = []


class InUse(LoadError):
    """The worker serves another client."""


def greet(endpoint: str, seconds: float = _SECONDS) -> float:
    """Seconds that a server takes to answer. Raises LoadError: nobody is there, or no server that can be used here."""
    host, port = parse_endpoint(endpoint)
    try:
        with socket.create_connection((host, port), timeout=seconds) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            began = time.perf_counter()
            connection.sendall(_HELLO)
            answer = b""
            while len(answer) < _REPLY.size and (more := connection.recv(_REPLY.size - len(answer))):
                answer += more
                connection.settimeout(max(0.001, began + seconds - time.perf_counter()))
            taken = time.perf_counter() - began
            _leave(connection)
    except TimeoutError as error:
        raise LoadError(
            f"worker {endpoint} does not answer within {seconds:g} s", hint=_AWAY, endpoint=endpoint
        ) from error
    except OSError as error:
        raise LoadError(
            f"worker {endpoint} is away: {printable(error.strerror or error)}", hint=_AWAY, endpoint=endpoint
        ) from error
    if answer.startswith(BUSY):
        raise InUse(
            f"worker {endpoint} serves another client",
            hint="It serves one at a time: wait, or use another.",
            endpoint=endpoint,
        )
    if len(answer) < _REPLY.size or (fields := _REPLY.unpack(answer))[0] != _REPLY.size - 8:
        raise LoadError(
            f"what answers at {endpoint} is no worker",
            hint="`handmill worker` on that machine is one.",
            endpoint=endpoint,
        )
    if fields[1] != PROTOCOL:
        raise LoadError(
            f"worker {endpoint} speaks version {fields[1]} of llama.cpp's protocol, and this is {PROTOCOL}",
            hint="Both machines need the same release of handmill.",
            endpoint=endpoint,
        )
    return taken


def _leave(connection: socket.socket) -> None:
    """Hang up, and wait for the server to do so: it serves one client at a time, and the next is on its way.

    A tunnel in between passes the end of one connection on later than the beginning of another.
    """
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(_LEAVE_SECONDS)
        while connection.recv(4096):
            pass


_AWAY = "Is `handmill worker` running there, at that address, and does the network let it through?"


def parse_endpoint(text: str, default_port: int | None = None) -> tuple[str, int]:
    """Host and port of `host:port`. Raises LoadError."""
    host, colon, port = text.rpartition(":")
    if not colon and default_port is not None:
        host, port = text, str(default_port)
    if not host or ":" in host or not port.isascii() or not port.isdecimal() or not 0 <= int(port[:6]) < 65536:
        raise LoadError(
            f"{printable(text, 80)!r} is no HOST:PORT",
            hint="llama.cpp knows names and IPv4 addresses, such as 192.168.1.20:50052.",
        )
    return host, int(port)


def add_workers(endpoints: Iterable[str]) -> list[str]:
    """Make the devices of these servers known to llama.cpp, the nearest first; a line on each that is left out."""
    there, notes = reachable(endpoints)
    for endpoint in there:
        add_server(endpoint)
    return notes


def reachable(endpoints: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those of the servers that answer, the nearest first; a line on each of the others."""
    near, notes = [], []
    for endpoint in dict.fromkeys(endpoints):
        try:
            taken = _greet_patiently(endpoint)
            near.append((taken if taken > _SAME_PLACE else 0.0, endpoint))
        except LoadError as error:
            notes.append(f"{error}; it is left out")
    return [endpoint for _, endpoint in sorted(near, key=lambda entry: entry[0])], notes


def add_server(endpoint: str) -> None:
    """Make the devices of an RPC server (`host:port`) known to llama.cpp, for good.

    They count as GPUs from here on. Raises LoadError where the build has no RPC backend or no server answers.
    A server lost later ends this process.
    """
    from runner.devices import ggml, ggml_base, rebuild_command

    registry = ggml().ggml_backend_reg_by_name(b"RPC")
    if not registry:
        raise LoadError("this build of llama.cpp has no RPC backend", hint=rebuild_command())
    _greet_patiently(endpoint)
    address = ggml_base().ggml_backend_reg_get_proc_address(registry, b"ggml_backend_rpc_add_server")
    add = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)
    with native.capture_log() as log:
        server = add(os.fsencode(endpoint))
    if not server:
        said = "; ".join(log.problems())
        raise LoadError(f"worker {endpoint} lends no device: {said}", endpoint=endpoint)
    ggml().ggml_backend_register(server)
    if endpoint not in _endpoints:
        _endpoints.append(endpoint)


def endpoints() -> Sequence[str]:
    """The servers added in this process, in their order: another process that adds them sees the same devices."""
    return tuple(_endpoints)


def _greet_patiently(endpoint: str) -> float:
    for _ in range(_TRIES - 1):
        try:
            return greet(endpoint)
        except InUse:
            time.sleep(_PAUSE)
    return greet(endpoint)
