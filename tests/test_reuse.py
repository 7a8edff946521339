"""No token is computed twice: every kind of memory, held against a fresh computation of the same prompt."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from convert.converter import convert_checkpoint
from convert.file_types import file_type
from models.errors import GenerationError
from runner.engine import loading
from runner.engine.branches import MOST_KEPT, WORTH_KEEPING
from runner.engine.context import Cancelled, Memory
from runner.engine.local import LocalEngine, load
from runner.engine.protocol import LoadOptions, Message, Sampling
from runner.session import ChatSession
from tests.checkpoints import tiny_checkpoint
from tests.memory_models import WINDOW, write_model

OPTIONS = LoadOptions(context=2048, gpu_layers=0, threads=1, cache=0, kv_types=("f32", "f32"))
ONE = Sampling(temperature=0.0, max_tokens=1)
MEMORIES = {
    "dense": Memory.CUTTABLE,
    "window": Memory.WINDOW,
    "whole window": Memory.CUTTABLE,
    "recurrent": Memory.STATE,
    "hybrid": Memory.STATE,
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memories")


@pytest.fixture(scope="module", params=MEMORIES)
def pair(request: pytest.FixtureRequest, model_folder: Path) -> Iterator[tuple[LocalEngine, LocalEngine]]:
    """An engine that remembers, and one of the same model to compute afresh with."""
    kind = request.param
    path = model_folder / f"{kind.split()[-1]}.gguf"
    if not path.exists():
        write_model(kind.split()[-1], model_folder)
    with pytest.MonkeyPatch.context() as patch:
        if kind == "window":
            patch.setattr(loading, "choose_window", lambda *_: (False, ()))
        with load(path, OPTIONS) as engine, load(path, OPTIONS) as other:
            assert engine._context.memory is MEMORIES[kind]
            yield engine, other


def words(seed: int, n: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 316) for _ in range(n)]


def ask(engine: LocalEngine, tokens: Sequence[int], marks: Sequence[int] = ()) -> int:
    """Compute `tokens`; how many were held already."""
    return list(engine.generate(tokens, ONE, marks=marks))[-1].stats.cached_tokens


def assert_as_fresh(pair: tuple[LocalEngine, LocalEngine], tokens: Sequence[int]) -> None:
    """The logits after the last request are those of computing its tokens from nothing."""
    engine, other = pair
    assert engine._context.held == list(tokens)
    context = other._context
    context.clear()
    context.extend(tokens)
    ours, fresh = engine._context.logits().astype(np.float64), context.logits().astype(np.float64)
    assert cosine(ours, fresh) > 0.99999


def cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def test_a_retry_decodes_one_token(pair: tuple[LocalEngine, LocalEngine]) -> None:
    tokens = words(1, 300)
    ask(pair[0], tokens)
    assert ask(pair[0], tokens) == len(tokens) - 1
    assert_as_fresh(pair, tokens)


def test_a_longer_prompt_goes_on(pair: tuple[LocalEngine, LocalEngine]) -> None:
    tokens = words(2, 200)
    ask(pair[0], tokens)
    longer = [*tokens, *words(3, 150)]
    assert ask(pair[0], longer) == len(tokens)
    assert_as_fresh(pair, longer)


def test_an_edit_keeps_what_comes_before_it(pair: tuple[LocalEngine, LocalEngine]) -> None:
    system, first, second = words(4, 100), words(5, 120), words(6, 90)
    ask(pair[0], [*system, *first], marks=[100])
    ask(pair[0], [*system, *first, *second], marks=[100, 220])
    edited = [*system, *first, *words(7, 60)]
    # The memory that cannot be cut goes back to the mark after the first message, which is as far as they agree.
    assert ask(pair[0], edited, marks=[100, 220]) == 220
    assert_as_fresh(pair, edited)
    other = [*system, *words(8, 70)]
    assert ask(pair[0], other, marks=[100]) == 100
    assert_as_fresh(pair, other)


def test_between_two_branches_nothing_is_computed_again(pair: tuple[LocalEngine, LocalEngine]) -> None:
    root = words(9, 100)
    one, two = [*root, *words(10, 300)], [*root, *words(11, 300)]
    ask(pair[0], one, marks=[100])
    assert ask(pair[0], two, marks=[100]) == 100
    for tokens in (one, two, one):
        assert ask(pair[0], tokens, marks=[100]) == len(tokens) - 1
        assert_as_fresh(pair, tokens)


def test_fifty_requests(pair: tuple[LocalEngine, LocalEngine]) -> None:
    """Undo, edit, retry, branch, at random: what is kept is what could be, and the logits are right."""
    engine = pair[0]
    engine._context.clear()
    engine._branches._kept.clear()
    chance = random.Random(12)
    system = words(13, 80)
    conversation: list[list[int]] = []
    known: list[list[int]] = []  # every prompt that was computed, the last one last
    marked: list[list[int]] = []  # the same, up to each of its marks
    for i in range(50):
        kind = chance.choice(["say", "say", "say", "retry", "undo", "edit"])
        if kind in ("say", "retry") or not conversation:
            if kind == "say" or not conversation:
                conversation.append(words(100 + i, chance.randrange(10, 120)))
        elif kind == "undo":
            conversation.pop()
        else:
            at = chance.randrange(len(conversation))
            conversation[at:] = [words(200 + i, chance.randrange(10, 120))]
        del conversation[:-8]
        tokens = [*system, *(token for turn in conversation for token in turn)]
        marks = [len(system)]
        for turn in conversation:
            marks.append(marks[-1] + len(turn))
        cached = ask(engine, tokens, marks)
        if engine._context.memory is Memory.CUTTABLE:
            # A branch left for fewer tokens than are worth a copy is computed again.
            could = max((common(tokens, other) for other in known[-1:]), default=0)
            kept = max((common(tokens, other) - WORTH_KEEPING for other in known), default=0)
            assert cached >= max(could, kept), (i, kind)
        elif known:
            shared = tokens[: common(tokens, known[-1])]
            could = max((len(mark) for mark in marked if mark == shared[: len(mark)]), default=0)
            assert cached >= could, (i, kind)
        assert cached <= len(tokens) - 1
        assert_as_fresh(pair, tokens)
        known.append(tokens)
        marked += [tokens[:n] for n in {*marks, len(tokens) - 1} if n < len(tokens)]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    n = 0
    while n < min(len(one) - 1, len(other)) and one[n] == other[n]:
        n += 1
    return n


def test_after_an_abort_in_the_prefill(pair: tuple[LocalEngine, LocalEngine]) -> None:
    context = pair[0]._context
    tokens = words(14, 1500)
    context.clear()
    context.extend(tokens[:600], marks=[500])
    context._flag[0] = b"\1"  # as an abort that comes while llama.cpp computes
    with pytest.raises(Cancelled):
        context.extend(tokens[600:])
    context.clear_abort()
    assert len(context.held) in ((500,) if context.memory is Memory.STATE else (600,))
    held = len(context.held)
    assert ask(pair[0], tokens) == held
    assert_as_fresh(pair, tokens)


def test_a_cancelled_step_leaves_a_state_whole(pair: tuple[LocalEngine, LocalEngine]) -> None:
    context = pair[0]._context
    tokens = words(15, 100)
    ask(pair[0], tokens)
    context.abort()
    with pytest.raises(Cancelled):
        context.advance([5], interruptible=False)
    context.clear_abort()
    context.advance([5], interruptible=False)
    assert_as_fresh(pair, [*tokens, 5])


def test_a_conversation_with_undo_and_retry(pair: tuple[LocalEngine, LocalEngine]) -> None:
    engine = pair[0]
    session = ChatSession(engine, "be brief and kind to those who ask", replace(ONE, max_tokens=8))
    list(session.reply("what is a mill and who works in it"))
    list(session.reply("and what does the miller eat"))
    first = session.last_stats
    assert first.cached_tokens > first.prompt_tokens // 2
    del session.messages[-2:]
    list(session.reply("and what does the miller eat"))
    again = session.last_stats
    assert again.prompt_tokens == first.prompt_tokens
    assert again.cached_tokens == again.prompt_tokens - 1


def test_one_token_that_differs_is_seen(pair: tuple[LocalEngine, LocalEngine]) -> None:
    """The comparison of logits would be worth nothing if it passed for another text."""
    tokens = words(17, 60)
    context = pair[1]._context
    found = []
    for last in (5, 6):
        context.clear()
        context.extend([*tokens[:40], last, *tokens[41:]])
        found.append(context.logits().astype(np.float64))
    assert cosine(*found) < 0.9999


def test_the_window_is_really_left(pair: tuple[LocalEngine, LocalEngine]) -> None:
    """The tests above would pass for a window that never slid."""
    context = pair[0]._context
    if context.memory is Memory.WINDOW:
        ask(pair[0], words(16, 40 * WINDOW))
        assert context._first() > 0
        assert not context._can_cut(context._first(), 2 * WINDOW)


def test_ids_outside_the_vocabulary(pair: tuple[LocalEngine, LocalEngine]) -> None:
    for wrong in (-1, 320, 10**9):
        with pytest.raises(GenerationError, match="outside the vocabulary"):
            pair[0].generate([5, wrong, 5], ONE)


def test_messages_have_marks(pair: tuple[LocalEngine, LocalEngine]) -> None:
    prompts = pair[0]._prompts
    messages = [
        Message("system", "be brief"),
        Message("user", "a mill"),
        Message("assistant", "b"),
        Message("user", "c"),
    ]
    tokens = prompts.encode_chat(messages)
    marks = sorted(prompts.marks(messages, tokens))
    text = [b"".join(prompts._vocabulary.piece(token) for token in tokens[:n]) for n in marks]
    assert text[0].endswith(b"<user>")
    assert text[-1].endswith(b"c<assistant>")


def test_a_reply_runs_on_where_a_full_context_may_be_shifted(pair: tuple[LocalEngine, LocalEngine]) -> None:
    engine = pair[0]
    tokens = words(18, 2000)
    for seed in range(20):  # one with which the reply does not end by itself
        sampling = Sampling(temperature=1.0, seed=seed, max_tokens=200)
        ended = list(engine.generate(tokens, sampling))[-1]
        if ended.finish_reason == "length":
            break
    assert (ended.finish_reason, ended.stats.generated_tokens) == ("length", 49)
    last = list(engine.generate(tokens, sampling, shift_after=100))[-1]
    if engine._context.memory is Memory.CUTTABLE:
        assert last.stats.generated_tokens == 200 or last.finish_reason == "stop"
        assert last.stats.shifted_tokens == (2048 - 100) // 2
        assert engine._context.held[:100] == tokens[:100]
        assert engine._context.held[100:102] == tokens[100 + 974 : 100 + 976]
    else:
        assert (last.finish_reason, last.stats.shifted_tokens) == ("length", 0)


def test_a_shift_moves_positions_with_the_tokens(tmp_path: Path) -> None:
    """In a model of one block no key and no value has seen another token: a shift is exact."""
    source = tiny_checkpoint(tmp_path / "one", dtype="F32", num_hidden_layers=1)
    path = convert_checkpoint(source, tmp_path / "one.gguf", file_type("F32")).path
    with load(path, replace(OPTIONS, context=256)) as engine, load(path, replace(OPTIONS, context=256)) as other:
        tokens = words(19, 90)
        engine._context.extend(tokens)
        assert engine._context.shift(20, 30)
        rest = [*tokens[:20], *tokens[50:], 7]
        engine._context.extend([7])
        assert_as_fresh((engine, other), rest)


def test_only_so_many_branches_are_kept(model_folder: Path) -> None:
    path = model_folder / "dense.gguf"
    if not path.exists():
        write_model("dense", model_folder)
    with load(path, OPTIONS) as engine:
        for seed in range(MOST_KEPT + 8):
            ask(engine, words(100 + seed, 2 * WORTH_KEEPING))
        assert len(engine._branches._kept) == MOST_KEPT
        # the oldest is gone, the newest is not
        assert ask(engine, words(100, 2 * WORTH_KEEPING)) < WORTH_KEEPING
        assert ask(engine, words(100 + MOST_KEPT + 6, 2 * WORTH_KEEPING)) == 2 * WORTH_KEEPING - 1
