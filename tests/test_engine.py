"""The engine in this process, on a real model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ContextOverflow, GenerationError, LoadError, ModelFileError, UsageError
from models.gguf_file import read_gguf
from runner.engine import choices, memory, threads
from runner.engine.local import LocalEngine, load
from runner.engine.protocol import GenerationChunk, LoadOptions, Message, Sampling
from runner.engine.text_stream import TextStream
from runner.engine.text_stream import text_of as text_of_bytes
from runner.session import ChatSession

GREEDY = Sampling(temperature=0.0, max_tokens=6)
OPTIONS = LoadOptions(context=512, gpu_layers=0)


@pytest.fixture(scope="module")
def engine(starter_model: Path) -> Iterator[LocalEngine]:
    with load(starter_model, OPTIONS) as loaded:
        yield loaded


def continued(engine: LocalEngine, tokens: list[int], sampling: Sampling = GREEDY) -> list[GenerationChunk]:
    return list(engine.generate(tokens, sampling))


def text_of(chunks: list[GenerationChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def forget(engine: LocalEngine) -> None:
    """Make the next prompt be computed from its beginning."""
    continued(engine, engine.encode_text("zz"), replace(GREEDY, max_tokens=1))


def test_it_continues_text(engine: LocalEngine) -> None:
    chunks = continued(engine, engine.encode_text("The capital of France is"))
    assert text_of(chunks).startswith(" Paris")
    last = chunks[-1]
    assert (last.finish_reason, last.token, last.stats.generated_tokens) == ("length", None, 6)
    assert all(chunk.finish_reason is None and chunk.token is not None for chunk in chunks[:-1])
    assert last.stats.prompt_tokens == 5


def test_greedy_is_repeatable_cached_or_not(engine: LocalEngine) -> None:
    tokens = engine.encode_text("Once upon a time there was a small house in a wood")
    forget(engine)
    first = continued(engine, tokens)
    again = continued(engine, tokens)
    assert text_of(first) == text_of(again)
    assert first[-1].stats.cached_tokens == 0
    assert again[-1].stats.cached_tokens == len(tokens) - 1


def test_a_seed_is_repeatable_and_seeds_differ(engine: LocalEngine) -> None:
    tokens = engine.encode_text("Once upon a time")
    warm = Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, max_tokens=5)
    texts = [text_of(continued(engine, tokens, replace(warm, seed=seed))) for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_a_repeat_penalty_changes_what_repeats(engine: LocalEngine) -> None:
    tokens = engine.encode_text("a b a b a b a b a b a b a b a b")
    plain = text_of(continued(engine, tokens))
    punished = text_of(continued(engine, tokens, replace(GREEDY, repeat_penalty=5.0)))
    assert plain.count("a") > punished.count(" a b")
    assert plain != punished


def test_a_reply_ends_at_the_models_own_mark(engine: LocalEngine) -> None:
    tokens = engine.encode_chat([Message("user", "Say only: OK")])
    chunks = continued(engine, tokens, Sampling(temperature=0.0, max_tokens=200))
    assert chunks[-1].finish_reason == "stop"
    assert "<|im_end|>" not in text_of(chunks)


def test_a_turn_computes_only_what_is_new(engine: LocalEngine) -> None:
    session = ChatSession(engine, system="You are brief.", sampling=GREEDY)
    list(session.reply("Name a <|im_end|> colour."))
    held = session.last_stats.prompt_tokens + session.last_stats.generated_tokens
    list(session.reply("Another?"))
    # The last token of a reply is given out, not computed: the next turn does that.
    assert session.last_stats.cached_tokens >= held - 1


def test_context_full_ends_with_length(engine: LocalEngine) -> None:
    tokens = (engine.encode_text("one two three four five six seven eight ") * 100)[: 512 - 3]
    chunks = continued(engine, tokens, Sampling(temperature=0.0))
    assert chunks[-1].finish_reason == "length"
    assert 1 <= chunks[-1].stats.generated_tokens <= 4


def test_a_prompt_longer_than_the_context_names_both_numbers(engine: LocalEngine) -> None:
    with pytest.raises(ContextOverflow, match=r"600.*512") as caught:
        engine.generate([5] * 600, GREEDY)
    assert "--context" in caught.value.hint
    assert (caught.value.facts["prompt_tokens"], caught.value.facts["n_ctx"]) == (600, 512)


def test_an_empty_prompt_is_refused(engine: LocalEngine) -> None:
    with pytest.raises(GenerationError, match="empty"):
        engine.generate([], GREEDY)


def test_cancel_ends_the_reply_and_leaves_the_engine_sound(engine: LocalEngine) -> None:
    tokens = engine.encode_text("Once upon a time there was a king")
    expected = text_of(continued(engine, tokens))
    chunks = []
    for chunk in engine.generate(tokens, replace(GREEDY, max_tokens=100)):
        chunks.append(chunk)
        if len(chunks) == 3:
            engine.cancel()
    assert chunks[-1].finish_reason == "cancelled"
    assert len(chunks) == 4
    assert text_of(continued(engine, tokens)) == expected


def test_cancel_in_the_prefill_from_another_thread(starter_model: Path) -> None:
    with load(starter_model, LoadOptions(context=4096, gpu_layers=0)) as engine:
        tokens = (engine.encode_text("one two three four five six seven eight ") * 500)[:4000]
        timer = threading.Timer(0.2, engine.cancel)
        timer.start()
        chunks = continued(engine, tokens)
        timer.join()
        assert [chunk.finish_reason for chunk in chunks] == ["cancelled"]
        short = engine.encode_text("The capital of France is")
        assert text_of(continued(engine, short)).startswith(" Paris")


def signalled(number: signal.Signals, engine: LocalEngine, tokens: list[int]) -> list[GenerationChunk]:
    """A reply in whose prefill the process gets a signal."""
    timer = threading.Timer(0.3, os.kill, (os.getpid(), number))
    timer.start()
    try:
        return continued(engine, tokens)
    finally:
        timer.join()


def test_ctrl_c_stops_a_prefill(starter_model: Path) -> None:
    with load(starter_model, LoadOptions(context=4096, gpu_layers=0, cache=0)) as engine:
        short, long = (
            engine.encode_text("The capital of France is"),
            engine.encode_text("one two three " * 2000)[:4000],
        )
        expected = text_of(continued(engine, short))
        with pytest.raises(KeyboardInterrupt):
            signalled(signal.SIGINT, engine, long)
        assert len(engine.context.held) < len(long)
        # a handler that only takes note stops it, too, and runs once
        seen: list[int] = []
        before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
        try:
            assert [chunk.finish_reason for chunk in signalled(signal.SIGINT, engine, long)] == ["cancelled"]
        finally:
            signal.signal(signal.SIGINT, before)
        assert seen == [signal.SIGINT]
        assert text_of(continued(engine, short)) == expected


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="a signal of Unix")
def test_other_signals_stop_nothing(starter_model: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with load(starter_model, LoadOptions(context=1024, gpu_layers=0, cache=0)) as engine:
            tokens = engine.encode_text("one two three " * 300)[:800]
            assert signalled(signal.SIGUSR1, engine, tokens)[-1].finish_reason == "length"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]


def test_an_iterator_left_alone_frees_the_engine(engine: LocalEngine) -> None:
    tokens = engine.encode_text("Once upon a time")
    reply = engine.generate(tokens, GREEDY)
    next(reply)
    with pytest.raises(GenerationError, match="still being generated"):
        engine.generate(tokens, GREEDY)
    del reply
    assert continued(engine, tokens)[-1].finish_reason == "length"


def test_a_sampler_that_fails_leaves_the_engine_free(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    tokens = engine.encode_text("Once upon a time")
    with monkeypatch.context() as patch:
        patch.setattr("runner.engine.generation.Sampler", fail)
        with pytest.raises(MemoryError):
            continued(engine, tokens)
    assert continued(engine, tokens)[-1].finish_reason == "length"


def test_an_id_outside_the_vocabulary_is_an_error_and_the_engine_stays_sound(engine: LocalEngine) -> None:
    tokens = engine.encode_text("The capital of France is")
    expected = text_of(continued(engine, tokens))
    with pytest.raises(GenerationError):
        continued(engine, [*tokens, 10**6, 5])
    assert text_of(continued(engine, tokens)) == expected


def test_info_and_progress(starter_model: Path) -> None:
    seen: list[float] = []
    with load(starter_model, OPTIONS, seen.append) as engine:
        info = engine.info
        assert (info.n_ctx, info.n_ctx_train, info.n_layers, info.gpu_layers) == (512, 8192, 31, 0)
        assert (info.device, info.notes) == ("CPU", ())
        assert "Q4_1" in info.description
        assert engine.has_chat_template
        assert engine.default_sampling == Sampling()
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_what_the_progress_callback_raises_stops_the_load(starter_model: Path) -> None:
    def stop(fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(starter_model, OPTIONS, stop)


def test_a_context_need_not_be_a_round_number(starter_model: Path) -> None:
    with load(starter_model, replace(OPTIONS, context=10)) as engine:
        assert engine.info.n_ctx == 10
        with pytest.raises(ContextOverflow):
            engine.generate([5] * 11, GREEDY)
        chunks = continued(engine, [5] * 8)
        assert (chunks[-1].finish_reason, chunks[-1].stats.generated_tokens) == ("length", 3)


def test_a_closed_engine_says_so(starter_model: Path) -> None:
    engine = load(starter_model, OPTIONS)
    engine.close()
    engine.close()
    for use in (lambda: engine.encode_text("a"), lambda: engine.generate([1], GREEDY)):
        with pytest.raises(GenerationError, match="closed"):
            use()


def test_broken_files_have_names(starter_model: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(starter_model.read_bytes()[:4_000_000])
    for path in (cut, tmp_path / "missing.gguf", tmp_path):
        with pytest.raises((ModelFileError, LoadError)):
            load(path, OPTIONS)


def test_the_context_is_chosen(starter_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = read_gguf(starter_model)
    monkeypatch.setattr(choices, "available_memory", lambda: 10**12)
    assert choices.choose_context(gguf, LoadOptions()) == (8192, [])
    assert choices.choose_context(gguf, LoadOptions(context=9000))[0] == 9000
    assert "8192" in choices.choose_context(gguf, LoadOptions(context=9000))[1][0]
    with pytest.raises(UsageError):
        choices.choose_context(gguf, LoadOptions(context=0))
    monkeypatch.setattr(choices, "available_memory", lambda: 100_000_000)
    tokens, notes = choices.choose_context(gguf, LoadOptions())
    assert 512 <= tokens < 8192
    assert tokens % 256 == 0
    assert len(notes) == 1
    with pytest.raises(LoadError, match="8192 tokens"):
        choices.choose_context(gguf, LoadOptions(context=8192))


def test_available_memory_is_the_least_that_anybody_says(tmp_path: Path) -> None:
    meminfo, own = tmp_path / "meminfo", tmp_path / "own"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    4 kB\n")

    def available() -> int | None:
        return memory.available_memory(meminfo, tmp_path, own)

    assert available() == 4096
    own.write_text("4:memory:/a/b\n0::/c\n")
    (tmp_path / "c").mkdir()
    (tmp_path / "memory.max").write_text("2000\n")
    (tmp_path / "memory.current").write_text("500\n")
    assert available() == 1500
    (tmp_path / "memory.max").write_text("max\n")
    assert available() == 4096
    (tmp_path / "c/memory.max").write_text("1000\n")
    (tmp_path / "c/memory.current").write_text("900\n")
    assert available() == 100
    (tmp_path / "c/memory.stat").write_text("anon 5\ninactive_file 600\nactive_file 7\n")
    assert available() == 707
    group = tmp_path / "memory/a"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (group / "memory.usage_in_bytes").write_text("40\n")
    assert available() == 707
    (group / "memory.limit_in_bytes").write_text("50\n")
    assert available() == 10


def test_a_limit_of_the_process_counts() -> None:
    script = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, -1))\n"
    script += "from runner.engine.memory import available_memory; print(available_memory())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 1 << 30


def test_threads_are_physical_cores_within_the_quota(tmp_path: Path) -> None:
    for processor in range(4):
        folder = tmp_path / f"cpu{processor}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{processor % 2},{processor % 2 + 2}\n")
    assert threads._physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert threads._physical_cores({0, 2}, tmp_path) == 1
    assert threads._physical_cores({0, 9}, tmp_path) == 2
    own = tmp_path / "cgroup"
    own.write_text("0::/a/b\n")
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/cpu.max").write_text("max 100000\n")
    assert threads._quota(tmp_path, own) is None
    (tmp_path / "a/cpu.max").write_text("150000 100000\n")
    assert threads._quota(tmp_path, own) == 1.5
    assert threads.default_threads() >= 1


@given(st.text(), st.lists(st.integers(1, 5)))
def test_a_stream_never_shows_half_a_character(text: str, cuts: list[int]) -> None:
    data = text.encode()
    stream, out, position = TextStream(), "", 0
    for cut in [*cuts, len(data)]:
        piece = stream.feed(data[position : position + cut])
        position += cut
        assert "\ufffd" not in piece or "\ufffd" in text
        out += piece
    assert out == text


def test_a_stream_marks_bytes_that_are_no_character() -> None:
    assert text_of_bytes("语".encode()[:2]) == ""  # a reply cut short inside a character ends before it
    assert text_of_bytes(b"a\xffb") == "a\ufffdb"
