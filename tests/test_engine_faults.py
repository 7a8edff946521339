"""What an engine survives: other threads, closing at any time, files that change, numbers that are none."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.converter import convert_checkpoint
from convert.file_types import file_type
from models.errors import GenerationError, HandmillError, LoadError
from runner.engine import choices, loading
from runner.engine.context import Context
from runner.engine.context_params import ContextOptions
from runner.engine.local import LocalEngine, load
from runner.engine.protocol import LoadOptions, Message, Sampling
from runner.placement import Split
from tests.checkpoints import tiny_checkpoint, write_tiny_tokenizer
from tests.memory_models import write_model

OPTIONS = LoadOptions(context=512, gpu_layers=0, threads=1, cache=0)
LONG = Sampling(temperature=1.0, seed=1, max_tokens=400, logit_bias=((2, -100.0),))  # 2: the end of a text
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("dense", tmp_path_factory.mktemp("dense"))


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """The result of `work`, or the named error that it ends with, once the thread has ended."""
    result: list[object] = []

    def body() -> None:
        try:
            result.append(work())
        except HandmillError as error:
            result.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    return thread, result


def test_a_second_caller_is_refused_or_waits(dense: Path) -> None:
    for when_busy in ("refuse", "wait"):
        with load(dense, replace(OPTIONS, when_busy=when_busy)) as engine:
            reply = engine.generate(PROMPT, LONG)
            next(reply)
            thread, result = in_thread(lambda: len(list(engine.generate(PROMPT, replace(LONG, max_tokens=3)))))
            if when_busy == "wait":
                thread.join(0.3)
                assert thread.is_alive()
                # a thread that waited for itself would wait for ever
                with pytest.raises(GenerationError, match="still being generated"):
                    list(engine.generate(PROMPT, LONG))
                list(reply)
            thread.join()
            assert result[0] == 4 if when_busy == "wait" else isinstance(result[0], GenerationError)


def test_many_threads_take_turns(dense: Path) -> None:
    with load(dense, replace(OPTIONS, when_busy="wait")) as engine:
        alone = [chunk.token for chunk in engine.generate(PROMPT, replace(LONG, max_tokens=10))]
        threads = [
            in_thread(lambda: [chunk.token for chunk in engine.generate(PROMPT, replace(LONG, max_tokens=10))])
            for _ in range(8)
        ]
        for thread, result in threads:
            thread.join()
            assert result == [alone]


def last_reason(engine: LocalEngine) -> object:
    return list(engine.generate(PROMPT, LONG))[-1].finish_reason


def test_closing_while_another_thread_generates(dense: Path) -> None:
    for wait in (0.0, 0.01, 0.05, 0.1):
        engine = load(dense, OPTIONS)
        thread, result = in_thread(partial(last_reason, engine))
        time.sleep(wait)
        engine.close()
        thread.join()
        assert result[0] in ("cancelled", "length") or isinstance(result[0], GenerationError)


def test_closing_with_a_reply_half_read(dense: Path) -> None:
    engine = load(dense, OPTIONS)
    reply = engine.generate(PROMPT, LONG)
    next(reply)
    engine.close()
    assert next(reply).finish_reason == "cancelled"
    with pytest.raises(GenerationError, match="closed"):
        engine.chat([Message("user", "hi")])


def test_an_engine_that_nobody_closes_is_freed(dense: Path) -> None:
    engine = load(dense, OPTIONS)
    context = engine.context
    list(engine.generate(PROMPT, replace(LONG, max_tokens=2)))
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    assert context.pointer is None


def test_a_file_that_is_deleted_or_replaced_while_it_is_loaded(dense: Path, tmp_path: Path) -> None:
    for change in ("deleted", "replaced"):
        path = tmp_path / f"{change}.gguf"
        path.write_bytes(dense.read_bytes())
        with load(path, OPTIONS) as engine:
            before = [chunk.token for chunk in engine.generate(PROMPT, replace(LONG, max_tokens=5))]
            if change == "deleted":
                path.unlink()
            else:
                other = tmp_path / "other"
                other.write_bytes(b"x" * 100)
                other.replace(path)
            engine.context.clear()
            assert [chunk.token for chunk in engine.generate(PROMPT, replace(LONG, max_tokens=5))] == before


def test_logits_that_are_no_numbers(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "nan", dtype="F32")
    write_tiny_tokenizer(source)
    path = convert_checkpoint(source, tmp_path / "nan.gguf", file_type("F32")).path
    with load(path, OPTIONS) as engine:
        context = engine.context
        context.extend(PROMPT)
        context.logits()[7] = np.nan
        with pytest.raises(GenerationError, match="no numbers"):
            context.logits()
        assert context.held == []
        assert list(engine.generate(PROMPT, replace(LONG, max_tokens=2)))[-1].finish_reason == "length"


def test_a_context_that_memory_does_not_hold_names_one_that_fits(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "available_memory", lambda: 600_000)
    with pytest.raises(LoadError, match="4096 tokens") as caught:
        load(dense, replace(OPTIONS, context=4096))
    assert "--context 2304 fits" in caught.value.hint


def test_a_decode_that_fails_in_the_middle(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(dense, OPTIONS) as engine:
        context = engine.context
        expected = [chunk.token for chunk in engine.generate(PROMPT, replace(LONG, max_tokens=9))]
        lib, calls = context._lib, iter(range(100))

        class Failing:
            def __getattr__(self, name: str) -> object:
                if name == "llama_decode" and next(calls) == 4:
                    return lambda *_: -3
                return getattr(lib, name)

        monkeypatch.setattr(context, "_lib", Failing())
        context.clear()
        reply = engine.generate(PROMPT, replace(LONG, max_tokens=9))
        with pytest.raises(GenerationError, match="status -3"):
            list(reply)
        assert [chunk.token for chunk in engine.generate(PROMPT, replace(LONG, max_tokens=9))] == expected


def test_loading_again_and_again_does_not_grow(dense: Path) -> None:
    script = f"""
import resource
from pathlib import Path
from typing import Any
from runner.engine.local import load
from runner.engine.protocol import LoadOptions, Sampling
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for i in range(60):
    with load(Path({str(dense)!r}), LoadOptions(context=512, gpu_layers=0, threads=1, cache=0)) as engine:
        list(engine.generate([5, 6, 7], Sampling(max_tokens=3)))
    if i == 20:
        before = peak()
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4_000  # kB; a context alone takes more than a hundred


def test_a_context_of_no_model_is_refused(dense: Path) -> None:
    with load(dense, OPTIONS) as engine:
        too_long = ContextOptions(n_ctx=2**31 - 1, threads=1, batch_threads=1)
        with pytest.raises(LoadError, match="context"):
            Context(engine._loaded.model, too_long)


def test_what_only_saves_time_gives_way_to_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a state to go back to, where llama.cpp finds no room for them."""
    attempt = loading._attempt

    def full(path: Path, split: Split, settings: ContextOptions, *args: Any, **kwargs: Any) -> Any:
        if settings.rollback:
            raise LoadError("llama.cpp cannot make a context: failed to allocate buffer")
        return attempt(path, split, settings, *args, **kwargs)

    model = write_model("hybrid", tmp_path)
    with load(model, OPTIONS) as engine:
        assert engine.context.most_drafted > 0
    monkeypatch.setattr(loading, "_attempt", full)
    with load(model, OPTIONS) as engine:
        assert engine.context.most_drafted == 0
        assert engine.info.notes == (
            "there is no memory for what only saves time (guesses, a whole window); tried without",
        )
        assert list(engine.generate(PROMPT, Sampling(temperature=0, max_tokens=4)))
