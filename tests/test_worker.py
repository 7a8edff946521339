"""Lending devices: real workers on this machine, and real clients."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from typing import Any

import pytest

from models.isolated import isolation
from runner import rpc
from runner.cli import main as cli
from runner.devices import Device, backends
from runner.devices import devices as all_devices
from runner.engine import local
from runner.engine.protocol import LoadOptions, Message, Sampling
from runner.engine.supervised import SupervisedEngine
from runner.worker import _is_connected, _notice_when_gone, _sockets
from tests.test_isolated import is_alive

pytestmark = pytest.mark.skipif("RPC" not in backends(), reason="this build has no RPC backend")

MB = 1 << 20
GREEDY = Sampling(temperature=0, max_tokens=30)
MESSAGES = [Message("user", "Name three rivers.")]


class Worker:
    """A running `handmill worker`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said = self.line()
        self.endpoint = self.said.rsplit(" ", 1)[1]

    def line(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.readline().strip()

    def server(self) -> int:
        """The process that serves."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])


@contextmanager
def worker(home: Path, *options: str) -> Iterator[Worker]:
    command = [sys.executable, "-m", "runner.cli.main", "worker", "--listen", "127.0.0.1:0", *options]
    # Two threads wait for each other at every operation; beside other programs that takes seconds a token.
    command += ["-j", "1"]
    environment = {**os.environ, "HANDMILL_HOME": str(home)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Worker(process)
        finally:
            process.terminate()
            process.wait(10)


def engine_on(model: Path, *endpoints: str, **more: Any) -> SupervisedEngine:
    options = LoadOptions(context=512, workers=endpoints, cache=0, repack=False, threads=2, **more)
    return SupervisedEngine(model, options)


def reply(engine: SupervisedEngine | local.LocalEngine) -> str:
    return "".join(chunk.text for chunk in engine.chat(MESSAGES, GREEDY))


@pytest.fixture(scope="module")
def expected(starter_model: Path) -> str:
    with local.load(starter_model, LoadOptions(context=512, gpu_layers=0, cache=0, repack=False)) as engine:
        return reply(engine)


def test_what_is_lent_is_used_and_what_is_away_is_said(starter_model: Path, tmp_path: Path, expected: str) -> None:
    with worker(tmp_path) as lent:
        assert lent.said.startswith("lending CPU (")
        with engine_on(starter_model, "127.0.0.1:1", lent.endpoint) as engine:
            assert engine.info.gpu_layers == 31
            assert engine.info.notes == ("worker 127.0.0.1:1 is away: Connection refused; it is left out",)
            assert reply(engine) == expected
        with engine_on(starter_model, "127.0.0.1:1") as engine:
            assert (engine.info.gpu_layers, len(engine.info.notes)) == (0, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_all_that_belongs_to_it(number: signal.Signals, tmp_path: Path) -> None:
    with worker(tmp_path) as lent:
        server = lent.server()
        lent.process.send_signal(number)
        assert lent.process.wait(10) in (130, 143, -signal.SIGKILL)
        for _ in range(500):
            if not is_alive(server):
                break
            time.sleep(0.02)
        assert not is_alive(server)
        if number != signal.SIGKILL:
            assert lent.line().startswith("handmill: stopped by ")


def test_a_second_client_is_told_and_the_next_is_served(starter_model: Path, tmp_path: Path) -> None:
    with worker(tmp_path) as lent:
        with engine_on(starter_model, lent.endpoint) as first:
            with pytest.raises(rpc.InUse, match="serves another client"):
                rpc.greet(lent.endpoint)
            with engine_on(starter_model, lent.endpoint) as second:
                assert second.info.gpu_layers == 0
                assert "serves another client; it is left out" in second.info.notes[0]
            assert first.info.gpu_layers == 31
            assert reply(first)
        for _ in range(3):  # clients that come and go in quick succession are none that wait
            assert rpc.greet(lent.endpoint) < rpc._SECONDS
        with engine_on(starter_model, lent.endpoint) as third:
            assert third.info.gpu_layers == 31


def test_a_server_that_ends_is_started_again(starter_model: Path, tmp_path: Path, expected: str) -> None:
    with worker(tmp_path) as lent, engine_on(starter_model, lent.endpoint) as engine:
        chunks = engine.chat(MESSAGES, GREEDY)
        said = "".join(next(chunks).text for _ in range(5))
        os.kill(lent.server(), signal.SIGKILL)
        rest = list(chunks)
        assert said + "".join(chunk.text for chunk in rest) == expected
        assert "its process ended (SIGKILL); it is started again" in lent.line()
        assert lent.line().endswith(f" at {lent.endpoint}")
        with engine_on(starter_model, lent.endpoint) as again:
            assert again.info.gpu_layers == 31


def test_a_worker_that_hangs_is_lost_and_one_that_pauses_is_not(
    starter_model: Path, tmp_path: Path, expected: str
) -> None:
    with worker(tmp_path) as lent, engine_on(starter_model, lent.endpoint) as engine:
        server = lent.server()
        for _ in range(100):  # known as one that answers
            if engine._process._lookout._answers:
                break
            time.sleep(0.05)
        chunks = engine.chat(MESSAGES, GREEDY)
        said = "".join(next(chunks).text for _ in range(3))
        os.kill(server, signal.SIGSTOP)
        timer = threading.Timer(2.0, os.kill, [server, signal.SIGCONT])
        timer.start()
        assert said + "".join(chunk.text for chunk in chunks) == expected
        assert engine.info.gpu_layers == 31
        chunks = engine.chat(MESSAGES, GREEDY)
        said = "".join(next(chunks).text for _ in range(3))
        os.kill(server, signal.SIGSTOP)
        rest = list(chunks)
        os.kill(server, signal.SIGCONT)
        assert said + "".join(chunk.text for chunk in rest) == expected
        assert any("no longer answers" in chunk.notice for chunk in rest)
        assert engine.info.gpu_layers == 0


def test_what_is_reported_as_free_is_what_is_lent(starter_model: Path, tmp_path: Path) -> None:
    with worker(tmp_path, "--memory", "400M") as lent, isolation() as apart:
        apart.call(rpc.add_server, lent.endpoint)
        (device,) = [found for found in apart.call(devices_of) if found.backend == "RPC"]
        assert 250 * MB < device.free <= 300 * MB  # a quarter is for a tensor that arrives
        assert device.total == 400 * MB
    with (
        worker(tmp_path / "other", "--memory", "140M") as lent,
        engine_on(starter_model, lent.endpoint, reserve=0) as engine,
    ):
        assert 0 < engine.info.gpu_layers < 31
        assert "as many as fit" in engine.info.notes[-1]
        assert reply(engine)


def devices_of() -> list[Device]:
    return all_devices()


def test_more_than_is_lent_is_refused(starter_model: Path, tmp_path: Path, expected: str) -> None:
    with (
        worker(tmp_path, "--memory", "60M") as lent,
        engine_on(starter_model, lent.endpoint, gpu_layers="all") as engine,
    ):
        assert engine.info.gpu_layers < 31
        assert any("tried again" in note for note in engine.info.notes)
        assert reply(engine) == expected


@contextmanager
def door_to(endpoint: str, bytes_per_second: float = inf) -> Iterator[Door]:
    door = Door(endpoint, bytes_per_second)
    try:
        yield door
    finally:
        door.close()


class Door:
    """A door to a server that counts what goes in, and lets it in so fast and no faster."""

    def __init__(self, endpoint: str, bytes_per_second: float) -> None:
        self.sent = 0
        self._bytes_per_second = bytes_per_second
        self._target = rpc.parse_endpoint(endpoint)
        self._door = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._door.getsockname()[1]}"
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        serving = []
        while True:
            client, _ = self._door.accept()
            if client.getpeername() == self._last:
                client.close()
                break
            serving.append(threading.Thread(target=self._serve, args=[client]))
            serving[-1].start()
        for thread in serving:
            thread.join()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as server:
            back = threading.Thread(target=self._pump, args=[server, client, False])
            back.start()
            self._pump(client, server, True)
            back.join()

    def _pump(self, source: socket.socket, to: socket.socket, counted: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self.sent += len(data) if counted else 0
                time.sleep(len(data) / self._bytes_per_second if counted else 0.0)
                to.sendall(data)  # and whatever comes next, be it the end, at once
            to.shutdown(socket.SHUT_WR)

    _last: object = None

    def close(self) -> None:
        with socket.socket() as knock:
            knock.bind(("127.0.0.1", 0))
            self._last = knock.getsockname()
            knock.connect(self._door.getsockname())
            self._accepting.join()
        self._door.close()


def test_what_was_sent_once_is_not_sent_again(starter_model: Path, tmp_path: Path) -> None:
    """llama.cpp's cache takes tensors of more than 10 MiB: of this model the embedding, 28 MiB."""
    sent = []
    with worker(tmp_path) as lent, door_to(lent.endpoint) as door:
        for _ in range(2):
            before = door.sent
            with engine_on(starter_model, door.endpoint) as engine:
                assert engine.info.gpu_layers == 31
                assert reply(engine)
            sent.append(door.sent - before)
    cached = sum(file.stat().st_size for file in (tmp_path / "worker").iterdir() if file.name != "index.json")
    assert cached > 20 * MB
    assert sent[0] - sent[1] == pytest.approx(cached, rel=0.01)


def test_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with worker(tmp_path) as lent:
        assert cli.main(["worker", "--listen", lent.endpoint]) == 2
        said = capsys.readouterr().err
        assert f"nothing can listen at {lent.endpoint}: Address already in use" in said
        assert "--listen" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--listen", "0.0.0.0:50999"], "ssh -N -L 50999:127.0.0.1:50999"),
        (["--listen", "::1:50999"], "is no HOST:PORT"),
        (["--listen", "127.0.0.1:99999"], "is no HOST:PORT"),
        (["--listen", "no.such.host.invalid:1"], "is no address of this machine"),
        (["--listen", "127.0.0.1:0", "--device", "CUDA7\x1b[2J"], "there is no device 'CUDA7"),
    ],
)
def test_what_cannot_be_lent(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["worker", *options]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "\x1b" not in said


def test_listening_wider_is_warned_of(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "runner.cli.main", "worker", "--listen", "0.0.0.0:0", "--insecure"]
    environment = {**os.environ, "HANDMILL_HOME": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(3)]
        process.terminate()
    assert "no authentication" in lines[0]
    assert "ssh -N -L" in lines[1]
    assert lines[2].startswith("lending ")


def test_the_protocol_is_that_of_the_library(tmp_path: Path) -> None:
    with worker(tmp_path) as lent:
        assert rpc.greet(lent.endpoint) < rpc._SECONDS


def test_fit_shows_what_the_way_costs_and_doctor_who_is_away(
    starter_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with worker(tmp_path) as lent:
        used = ["--worker", lent.endpoint, "--worker", "127.0.0.1:1"]
        assert cli.main(["fit", str(starter_model), "--json", *used]) == 0
        found = json.loads(capsys.readouterr().out)
        assert cli.main(["fit", str(starter_model), *used]) == 0
        table = capsys.readouterr().out
    assert found["gpu_layers"] == 31
    assert found["notes"] == ["worker 127.0.0.1:1 is away: Connection refused; it is left out"]
    far, near = found["devices"]
    assert (far["name"], near["name"], near["link_seconds"]) == ("RPC0", "CPU", None)
    assert 0 < far["link_seconds"] < 1
    assert found["tokens_per_second"] < 1 / far["link_seconds"]
    assert " ms a token" in table
    cli.main(["doctor", "--json", "--worker", "127.0.0.1:1"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert any(finding["probe"] == "worker" and "away" in finding["message"] for finding in findings)


def test_a_worker_behind_a_slow_line_is_filled_last(
    starter_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with worker(tmp_path) as one, worker(tmp_path) as near, door_to(one.endpoint, bytes_per_second=200_000) as far:
        used = ["--worker", far.endpoint, "--worker", near.endpoint, "--vram", "100M", "--reserve", "0", "-c", "512"]
        assert cli.main(["fit", str(starter_model), "--json", *used]) == 0
    found = json.loads(capsys.readouterr().out)
    layers = {device["name"]: device["layers"] for device in found["devices"]}
    slow, fast = (device["name"] for device in sorted(found["devices"][:2], key=lambda d: -d["link_seconds"]))
    assert found["gpu_layers"] == 31
    assert layers[fast] > layers[slow] > 0


def test_a_chat_goes_on_when_a_worker_goes(starter_model: Path, tmp_path: Path, expected: str) -> None:
    """The whole program: what came stays, a notice says what happened, the rest comes."""
    with worker(tmp_path) as lent:
        command = [sys.executable, "-m", "runner.cli.main", "chat", str(starter_model), "--json", "--cache", "off"]
        command += ["--worker", lent.endpoint, "--temperature", "0", "--max-tokens", "30", "-c", "512"]
        environment = {**os.environ, "HANDMILL_HOME": str(tmp_path)}
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as chat:
            assert chat.stdin is not None
            assert chat.stdout is not None
            chat.stdin.write(json.dumps({"content": MESSAGES[0].content}) + "\n")
            chat.stdin.flush()
            lines = [json.loads(chat.stdout.readline()) for _ in range(5)]
            lent.process.send_signal(signal.SIGKILL)
            while "finish_reason" not in lines[-1]:
                lines.append(json.loads(chat.stdout.readline()))
            chat.stdin.close()
            assert chat.wait(30) == 0
    assert lines[-1]["text"] == "".join(line.get("delta", "") for line in lines)
    assert lines[-1]["text"][:40] == expected[:40]
    assert (lines[-1]["device"], lines[-1]["generated_tokens"]) == ("CPU", 30)
    notices = [line["notice"] for line in lines if "notice" in line]
    assert "was lost" in notices[0]


def test_a_client_whose_machine_is_gone_is_noticed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        served, _ = server.accept()
        with served:
            port = server.getsockname()[1]
            assert [found.getpeername() for found in _sockets(port) if _is_connected(found)] == [client.getsockname()]
            _notice_when_gone(served)
            assert served.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert not client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_a_worker_that_hangs_while_a_model_is_loaded(starter_model: Path, tmp_path: Path, expected: str) -> None:
    timers: list[threading.Timer] = []
    with worker(tmp_path) as lent, door_to(lent.endpoint, bytes_per_second=15e6) as door:
        server = lent.server()

        def stop_soon(share: float) -> None:
            if not timers:  # the weights take some seconds; meanwhile it says that it is in use
                timers.append(threading.Timer(1.5, os.kill, [server, signal.SIGSTOP]))
                timers[0].start()

        options = LoadOptions(context=512, workers=(door.endpoint,), cache=0, repack=False, threads=2)
        with SupervisedEngine(starter_model, options, stop_soon) as engine:
            os.kill(server, signal.SIGCONT)
            assert engine.info.gpu_layers == 0
            assert f"worker {door.endpoint} no longer answers" in engine.info.notes[0]
            assert reply(engine) == expected
        timers[0].join()
