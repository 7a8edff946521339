"""An engine in a process of its own, over devices that are lost, hang and come back: RPC servers on this machine."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models import isolated
from models.errors import ContextOverflow, GenerationError, LoadError, ModelFileError
from runner.cli import main as cli
from runner.devices import backends
from runner.engine import local
from runner.engine.protocol import GenerationChunk, LoadOptions, Message, Sampling
from runner.engine.supervised import Patience, SupervisedEngine
from tests.memory_models import write_model
from tests.rpc_server import rpc_process, rpc_server
from tests.test_isolated import is_alive

pytestmark = pytest.mark.skipif("RPC" not in backends(), reason="this build has no RPC backend")

GREEDY = Sampling(temperature=0, max_tokens=40)
MESSAGES = [Message("user", "Name three rivers.")]
LISTING = r'root ::= ([0-9] ". " [A-Za-z ]+ "\n")+'


def options(*workers: str, **more: Any) -> LoadOptions:
    # Weights laid out anew for the CPU round otherwise: a reply that goes on there could go another way.
    return LoadOptions(context=512, workers=workers, cache=0, repack=False, threads=2, **more)


@pytest.fixture(scope="module")
def expected(starter_model: Path) -> str:
    with local.load(starter_model, options(gpu_layers=0)) as engine:
        return text_of(engine.chat(MESSAGES, GREEDY))


def text_of(chunks: Iterator[GenerationChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def taken(chunks: Iterator[GenerationChunk], n: int) -> str:
    return "".join(next(chunks).text for _ in range(n))


def test_it_is_the_engine_that_it_would_be_in_this_process(starter_model: Path, expected: str) -> None:
    shares: list[float] = []
    with rpc_server() as endpoint, SupervisedEngine(starter_model, options(endpoint), shares.append) as engine:
        assert (engine.info.gpu_layers, engine.info.n_layers, engine.info.n_ctx) == (31, 31, 512)
        assert "RPC0" in engine.info.device
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
        chunks = list(engine.chat(MESSAGES, GREEDY))
        assert "".join(chunk.text for chunk in chunks) == expected
        assert (chunks[-1].finish_reason, chunks[-1].stats.generated_tokens) == ("length", 40)
        tokens = engine.encode_chat(MESSAGES)
        again = list(engine.generate(tokens, GREEDY))
        assert "".join(chunk.text for chunk in again) == expected
        assert again[-1].stats.cached_tokens == len(tokens) - 1
        assert engine.encode_text("Hello") == [19556]
        assert engine.has_chat_template
        with pytest.raises(ContextOverflow, match="600 tokens and the context holds 512"):
            next(engine.generate([1] * 600))
        assert [speed.test for speed in engine.speeds(prompt=8, generate=4, depths=[0], rounds=1)] == ["pp8", "tg4"]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_lost_in_a_reply(sent: signal.Signals, starter_model: Path, expected: str) -> None:
    """Killed, it ends the engine's process; stopped, it never answers."""
    patience = Patience(least=2.0)
    with (
        rpc_process() as (endpoint, worker),
        SupervisedEngine(starter_model, options(endpoint), patience=patience) as engine,
    ):
        chunks = engine.chat(MESSAGES, GREEDY)
        said = taken(chunks, 10)
        worker.send_signal(sent)
        rest = list(chunks)
        assert said + "".join(chunk.text for chunk in rest) == expected
        notices = [chunk.notice for chunk in rest if chunk.notice]
        assert "lost" in notices[0]
        assert any("0/31 layers on CPU" in notice for notice in notices)
        assert all(notice.isprintable() for notice in notices)
        last = rest[-1].stats
        assert (last.prompt_tokens, last.generated_tokens) == (len(engine.encode_chat(MESSAGES)), 40)
        assert (engine.info.gpu_layers, engine.info.device, engine.info.n_ctx) == (0, "CPU", 512)
        assert text_of(engine.chat(MESSAGES, GREEDY)) == expected


def test_a_grammar_and_a_stop_text_stand_where_they_stood(starter_model: Path) -> None:
    constrained = Sampling(temperature=0, max_tokens=60, grammar=LISTING, stop=("\n3",))
    with local.load(starter_model, options(gpu_layers=0)) as engine:
        expected = text_of(engine.chat(MESSAGES, constrained))
    assert expected.startswith("1. ")
    for n in (1, 5, 12):
        with rpc_process() as (endpoint, worker), SupervisedEngine(starter_model, options(endpoint)) as engine:
            chunks = engine.chat(MESSAGES, constrained)
            said = taken(chunks, n)
            worker.kill()
            assert said + text_of(chunks) == expected


def test_a_worker_that_is_lost_between_replies(starter_model: Path, expected: str) -> None:
    with rpc_process() as (endpoint, worker), SupervisedEngine(starter_model, options(endpoint)) as engine:
        assert text_of(engine.chat(MESSAGES, GREEDY)) == expected
        worker.kill()
        assert text_of(engine.chat(MESSAGES, GREEDY)) == expected
        assert engine.info.gpu_layers == 0


def test_the_end_of_its_process_while_nothing_is_computed(starter_model: Path) -> None:
    with rpc_server() as endpoint, SupervisedEngine(starter_model, options(endpoint)) as engine:
        engine._process.apart.kill()
        assert engine.encode_text("Hello") == [19556]


def test_what_was_cancelled_ends_soon_also_when_nobody_answers(starter_model: Path, expected: str) -> None:
    with rpc_process() as (endpoint, worker), SupervisedEngine(starter_model, options(endpoint)) as engine:
        chunks = engine.chat(MESSAGES, GREEDY)
        taken(chunks, 5)
        worker.send_signal(signal.SIGSTOP)
        threading.Timer(0.1, engine.cancel).start()
        assert [chunk.finish_reason for chunk in chunks][-1] == "cancelled"
        worker.send_signal(signal.SIGCONT)
        assert text_of(engine.chat(MESSAGES, GREEDY)) == expected
        assert engine.info.gpu_layers == 31


def test_the_first_tokens_of_a_device_may_take_long(starter_model: Path, expected: str) -> None:
    """It compiles its kernels. That the process heard the question at once says nothing of them."""
    patience = Patience(first=60.0, least=0.5, factor=1.0)
    with (
        rpc_process() as (endpoint, worker),
        SupervisedEngine(starter_model, options(endpoint), patience=patience) as engine,
    ):
        worker.send_signal(signal.SIGSTOP)
        threading.Timer(2.0, worker.send_signal, [signal.SIGCONT]).start()
        assert next(engine.chat(MESSAGES, GREEDY)).text
        assert engine.info.gpu_layers == 31
    assert patience.slowest is not None
    assert patience.slowest > 2.0 / 100  # of some forty tokens


class OfManyTokens(Patience):
    def seconds(self, tokens: int) -> float:
        return 3.0 if tokens == 1 else 60.0


def test_what_was_abandoned_may_be_finished_first(starter_model: Path, expected: str) -> None:
    with (
        rpc_process() as (endpoint, worker),
        SupervisedEngine(starter_model, options(endpoint), patience=OfManyTokens()) as engine,
    ):
        worker.send_signal(signal.SIGSTOP)
        threading.Timer(0.5, engine.cancel).start()
        assert [chunk.finish_reason for chunk in engine.chat(MESSAGES, GREEDY)] == ["cancelled"]
        threading.Timer(5.0, worker.send_signal, [signal.SIGCONT]).start()
        assert text_of(engine.chat(MESSAGES, GREEDY)) == expected
        assert engine.info.gpu_layers == 31


def test_a_reply_that_nobody_reads_on_gives_way(starter_model: Path, expected: str) -> None:
    with rpc_server() as endpoint, SupervisedEngine(starter_model, options(endpoint)) as engine:
        chunks = engine.chat(MESSAGES, Sampling(temperature=0))
        taken(chunks, 3)
        with pytest.raises(GenerationError, match="still being generated"):
            engine.chat(MESSAGES, GREEDY)
        assert engine.encode_text("Hello") == [19556]
        assert isinstance(chunks, Generator)
        chunks.close()
        assert text_of(engine.chat(MESSAGES, GREEDY)) == expected


def test_ctrl_c_leaves_it_usable(starter_model: Path, expected: str) -> None:
    with rpc_server() as endpoint, SupervisedEngine(starter_model, options(endpoint)) as engine:
        chunks = engine.chat(MESSAGES, Sampling(temperature=0, max_tokens=400))
        taken(chunks, 3)
        timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            list(chunks)
        timer.join()
        assert text_of(engine.chat(MESSAGES, GREEDY)) == expected


def test_closing(starter_model: Path) -> None:
    with rpc_server() as endpoint:
        engine = SupervisedEngine(starter_model, options(endpoint))
        pid = engine._process.apart.call(os.getpid)
        chunks = engine.chat(MESSAGES, GREEDY)
        taken(chunks, 3)
        engine.close()
        engine.close()
        assert not is_alive(pid)
        assert [chunk.finish_reason for chunk in chunks] == ["cancelled"]
        with pytest.raises(GenerationError, match="closed"):
            engine.chat(MESSAGES, GREEDY)
        engine = SupervisedEngine(starter_model, options(endpoint))
        pid = engine._process.apart.call(os.getpid)
        del engine
        assert not is_alive(pid)


def test_closing_while_another_thread_reads(starter_model: Path) -> None:
    with rpc_server() as endpoint, SupervisedEngine(starter_model, options(endpoint)) as engine:
        chunks = engine.chat(MESSAGES, Sampling(temperature=0))
        taken(chunks, 3)
        timer = threading.Timer(0.2, engine.close)
        timer.start()
        assert list(chunks)[-1].finish_reason == "cancelled"
        timer.join()


def test_errors_are_those_of_the_engine(tmp_path: Path, starter_model: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with rpc_server() as endpoint:
        with pytest.raises(ModelFileError, match=r"broken\.gguf"):
            SupervisedEngine(broken, options(endpoint))
        with pytest.raises(LoadError, match="adapter"):
            SupervisedEngine(starter_model, options(endpoint, loras=((broken, 1.0),)))


def test_a_process_that_ends_on_every_device_is_an_error(
    starter_model: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rpc_server() as endpoint, SupervisedEngine(starter_model, options(endpoint)) as engine:
        chunks = engine.chat(MESSAGES, GREEDY)
        taken(chunks, 3)
        monkeypatch.setattr(isolated, "_CHILD", "raise SystemExit('no python here')")
        engine._process.apart.kill()
        with pytest.raises(GenerationError, match=r"could not be started again.*no python here"):
            list(chunks)
        with pytest.raises(GenerationError, match="no python here"):
            engine.encode_text("Hello")
        monkeypatch.undo()  # what stood in the way is gone
        assert text_of(engine.chat(MESSAGES, GREEDY)) == expected


@pytest.mark.parametrize("kind", ["window", "recurrent"])
def test_other_kinds_of_memory_go_on_too(kind: str, tmp_path: Path) -> None:
    model = write_model(kind, tmp_path)
    prompt = list(range(10, 60))
    with local.load(model, options(gpu_layers=0)) as engine:
        expected = [chunk.token for chunk in engine.generate(prompt, GREEDY) if chunk.token is not None]
    with rpc_process() as (endpoint, worker), SupervisedEngine(model, options(endpoint)) as engine:
        chunks = engine.generate(prompt, GREEDY)
        tokens = [next(chunks).token for _ in range(7)]
        worker.kill()
        tokens += [chunk.token for chunk in chunks if chunk.token is not None]
    assert tokens == expected


def test_patience_grows_with_what_was_seen() -> None:
    patience = Patience(first=100.0, least=5.0, factor=10.0)
    assert patience.seconds(512) == 612.0
    patience.waited(0.1, 1)
    assert patience.seconds(1) == 5.0
    assert patience.seconds(512) == 512.0  # a prompt takes longer than a token
    for seconds, tokens in ((64.0, 32), (0.1, 1)):
        patience.waited(seconds, tokens)
    assert patience.seconds(1) == 20.0


def test_waiting_for_its_turn(starter_model: Path, expected: str) -> None:
    said: list[str] = []
    with (
        rpc_server() as endpoint,
        SupervisedEngine(starter_model, options(endpoint, when_busy="wait")) as engine,
    ):
        threads = [
            threading.Thread(target=lambda: said.append(text_of(engine.chat(MESSAGES, GREEDY)))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert said == [expected] * 3


def test_whether_a_whole_window_is_kept_is_decided_by_the_memory_of_the_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model("window", tmp_path)
    kept = {}
    with rpc_server() as endpoint:
        for layers in ("auto", 1):  # with 1 the others found no room, as far as anybody knows
            with SupervisedEngine(model, replace(options(endpoint, gpu_layers=layers), context=4096)) as engine:
                (said,) = [note for note in engine.info.notes if note.startswith("sliding window")]
            assert cli.main(["fit", str(model), "--json", "-c", "4096", "-g", str(layers), "--worker", endpoint]) == 0
            found = json.loads(capsys.readouterr().out)
            assert said in found["notes"]
            kept[layers] = said, sum(device["kv"] for device in found["devices"])
    assert "the whole cache is kept" in kept["auto"][0]
    assert "only the window is kept" in kept[1][0]
    assert kept["auto"][1] > kept[1][1]
