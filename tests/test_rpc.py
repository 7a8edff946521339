"""Greeting a server before llama.cpp does: what is wrong with it has a name."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

import pytest

from models.errors import LoadError
from runner import rpc


def test_another_version_or_none_is_named() -> None:
    answers = [
        (b"\x1c" + bytes(7) + bytes([9, 0, 0]) + bytes(25), "speaks version 9 of llama.cpp's protocol, and this is 7"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is no worker"),
        (b"", "is no worker"),
        (rpc.BUSY, "serves another client"),
    ]
    for answer, says in answers:
        with socket.create_server(("127.0.0.1", 0)) as server:

            def answer_once(server: socket.socket = server, answer: bytes = answer) -> None:
                client, _ = server.accept()
                with client:
                    client.recv(64)
                    client.sendall(answer)

            thread = threading.Thread(target=answer_once)
            thread.start()
            with pytest.raises(LoadError, match=says):
                rpc.greet(f"127.0.0.1:{server.getsockname()[1]}")
            thread.join()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            client, _ = server.accept()
            with client, suppress(OSError):
                for _ in range(100):
                    client.sendall(b"\x1c")
                    time.sleep(0.1)

        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(LoadError, match="does not answer within"):
            rpc.greet(f"127.0.0.1:{server.getsockname()[1]}", 0.4)
        thread.join()
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(LoadError, match="does not answer"):
        rpc.greet(f"127.0.0.1:{silent.getsockname()[1]}", 0.2)


@pytest.mark.parametrize("text", ["", "host", ":1", "host:", "host:x", "host:65536", "::1:5", "host:١", "host:-1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(LoadError, match=r"is no HOST:PORT"):
        rpc.parse_endpoint(text)


def test_a_port_may_go_without_saying() -> None:
    assert rpc.parse_endpoint("host", 7) == ("host", 7)
    assert rpc.parse_endpoint("10.0.0.1:0", 7) == ("10.0.0.1", 0)
