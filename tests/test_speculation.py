"""Drafted tokens change nothing but the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.errors import HandmillError
from runner.engine import draft_model, loading
from runner.engine.local import LocalEngine, load
from runner.engine.lookup import Lookup
from runner.engine.protocol import LoadOptions, Message, Sampling
from runner.engine.speculation import BatchSeconds, Draft, Speculation
from tests.memory_models import assert_taken_back, write_model

OPTIONS = LoadOptions(context=1024, gpu_layers=0, threads=1, cache=0)
CODE = (
    "def area(width, height):\n    if width < 0 or height < 0:\n        raise ValueError('negative')\n"
    "    return width * height\n\n\ndef volume(width, height, depth):\n    return area(width, height) * depth\n"
)


# Guessing


def test_lookup_takes_the_place_with_the_longest_past() -> None:
    lookup = Lookup()
    lookup.begin([1, 2, 3, 4, 9, 7, 3, 4, 5, 1, 2, 3, 4])
    assert list(lookup.draft(3).tokens) == [9, 7, 3]  # 1 2 3 4 went on with 9; 7 3 4, which is nearer, with 5
    assert lookup.draft(3).kinds == [1, 2, 2]
    lookup.add(9)
    assert list(lookup.draft(2).tokens) == [7, 3]


@pytest.mark.parametrize("tokens", [[], [1], [1, 1], [1, 2, 3, 4, 5]])
def test_lookup_finds_nothing_where_nothing_came_before(tokens: list[int]) -> None:
    lookup = Lookup()
    lookup.begin(tokens)
    assert not lookup.draft(8).tokens


def test_lookup_follows_what_repeats() -> None:
    lookup = Lookup()
    lookup.begin([4] * 10)
    assert list(lookup.draft(3).tokens) == [4, 4, 4]  # what is guessed goes on with what is guessed
    lookup.begin([7, 8, 9] * 3)
    assert list(lookup.draft(7).tokens) == [7, 8, 9, 7, 8, 9, 7]
    assert not lookup.draft(0).tokens


# Deciding


def test_seconds_of_a_batch_follow_what_was_measured() -> None:
    seconds = BatchSeconds(slope=0.5)
    assert seconds.of(4) is None
    seconds.learn(1, 1.0)
    assert seconds.of(5) == pytest.approx(3.0)
    seconds.learn(5, 2.0)
    assert seconds.of(3) == pytest.approx(1.5)
    assert seconds.of(9) == pytest.approx(3.0)
    seconds.learn(5, 1e9)  # a pause of the machine
    assert seconds.of(5) == pytest.approx(2.5)


class Always:
    """Guesses that are all of one kind."""

    priors = (0.5,)
    seconds_each = 0.0

    def begin(self, tokens: Sequence[int]) -> None: ...

    def add(self, token: int) -> None: ...

    def draft(self, most: int) -> Draft:
        return Draft([7] * most, [0] * most)

    def close(self) -> None: ...


class Dear(Always):
    """Guesses that cost as much as they spare, and are counted."""

    seconds_each = 1.0
    asked = 0

    def draft(self, most: int) -> Draft:
        self.asked += 1
        return super().draft(most)


def test_guesses_that_cost_time_are_asked_for_ever_more_rarely() -> None:
    dear = Dear()
    speculation = Speculation(dear, BatchSeconds(slope=0.1))
    speculation.learn(Draft(), 0, 0.01)
    assert not any(speculation.draft(8).tokens for _ in range(1000))
    assert dear.asked < 25


def test_nothing_is_drafted_before_a_plain_step_was_measured_nor_where_it_does_not_pay() -> None:
    speculation = Speculation(Always(), BatchSeconds(slope=0.5))
    assert not speculation.draft(8).tokens
    speculation.learn(Draft(), 0, 0.01)
    speculation.seconds.learn(2, 0.02)  # two at once take as long as two apart
    assert not speculation.draft(8).tokens


def test_it_turns_itself_off_and_on_by_what_comes() -> None:
    speculation = Speculation(Always(), BatchSeconds(slope=0.3))
    speculation.learn(Draft(), 0, 0.01)
    assert speculation.draft(8).tokens
    for _ in range(40):
        speculation.learn(Draft([7], [0]), 0, 0.013)
    assert not speculation.draft(8).tokens
    for _ in range(60):  # what would have been right is seen without being computed
        speculation.draft(8)
        speculation.add(7)
    assert speculation.draft(8).tokens


# The whole


def ids(engine: LocalEngine, tokens: Sequence[int], sampling: Sampling, *, speculate: bool) -> tuple[list[int], int]:
    """The reply, and how many of its tokens were drafted and right."""
    whole = engine._loaded.speculation
    engine._context.clear()
    engine._loaded.speculation = whole if speculate else None
    try:
        chunks = list(engine.generate(tokens, sampling))
    finally:
        engine._loaded.speculation = whole
    return [chunk.token for chunk in chunks if chunk.token is not None], chunks[-1].stats.accepted_tokens


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything guessed is computed, whether it pays or not."""
    monkeypatch.setattr(Speculation, "_best_length", lambda self, draft: len(draft.tokens))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", ["dense", "window"])
def test_sampled_replies_are_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one seed the sampler draws the same numbers: equal distributions give equal tokens, drafted or not.

    A draw that falls just between two tokens may still go the other way, for the rounding of batches.
    """
    monkeypatch.setattr(loading, "choose_window", lambda *_: (False, ()))
    path = write_model(kind, tmp_path)
    drafted = same = 0
    with load(path, replace(OPTIONS, kv_types=("f32", "f32"))) as engine:
        prompt = [5, 6, 7, 8, 9, 10] * 12
        for seed in range(40):
            # Of few tokens, so that guesses come true now and then.
            sampling = Sampling(temperature=1.0, top_k=3, top_p=1.0, min_p=0.0, seed=seed, max_tokens=50)
            plain, _ = ids(engine, prompt, sampling, speculate=False)
            ours, accepted = ids(engine, prompt, sampling, speculate=True)
            same += ours == plain
            drafted += accepted
    assert drafted > 40
    assert same >= 36


class Knowing(Always):
    """Guesses a text that is known, with every fifth token wrong."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text, self._at = text, 0

    def begin(self, tokens: Sequence[int]) -> None:
        self._at = 0

    def add(self, token: int) -> None:
        self._at += 1

    def draft(self, most: int) -> Draft:
        at = self._at
        tokens = [token if i % 5 else token ^ 1 for i, token in enumerate(self._text[at : at + most], start=at)]
        return Draft(tokens, [0] * len(tokens))


@pytest.mark.usefixtures("eager")
def test_replies_of_a_hybrid_model_are_the_same(tmp_path: Path) -> None:
    drafted = same = 0
    with load(write_model("hybrid", tmp_path), replace(OPTIONS, kv_types=("f32", "f32"))) as engine:
        prompt = [5, 6, 7, 8, 9, 10] * 12
        for seed in range(20):
            sampling = Sampling(temperature=1.0, top_k=3, top_p=1.0, min_p=0.0, seed=seed, max_tokens=50)
            plain, _ = ids(engine, prompt, sampling, speculate=False)
            engine._loaded.speculation = Speculation(Knowing(plain), BatchSeconds(slope=0.1))
            ours, accepted = ids(engine, prompt, sampling, speculate=True)
            same += ours == plain
            drafted += accepted
    assert drafted > 300
    assert same >= 18


def test_a_state_goes_back_over_what_was_on_trial(tmp_path: Path) -> None:
    path = write_model("hybrid", tmp_path)
    with load(path, OPTIONS) as engine:
        context = engine._context
        assert context.most_drafted == 7
        assert_taken_back(context)
        # only over the last batch, and once: then as ever, to a checkpoint
        context.clear()
        context.extend([5, 6, 7])
        context.advance([7, 8, 9, 10], interruptible=False)
        context.truncate(5)
        assert context.held == [5, 6, 7, 7, 8]
        context.truncate(4)
        assert context.held == []


def test_a_state_without_copies_is_never_on_trial(tmp_path: Path) -> None:
    with load(write_model("recurrent", tmp_path), OPTIONS) as engine:  # Mamba: llama.cpp keeps none for it
        assert engine._context.most_drafted == 0
        assert engine._loaded.speculation is None


@pytest.mark.usefixtures("eager")
def test_greedy_replies_part_only_within_the_noise_of_batches(starter_model: Path) -> None:
    with load(starter_model, OPTIONS) as engine:
        message = Message("user", f"Repeat this code exactly as it is:\n```python\n{CODE}```")
        tokens = engine.encode_chat([message])
        sampling = Sampling(temperature=0.0, max_tokens=90)
        plain, _ = ids(engine, tokens, sampling, speculate=False)
        ours, accepted = ids(engine, tokens, sampling, speculate=True)
        assert accepted > 20
        parted = next((i for i, (a, b) in enumerate(zip(plain, ours, strict=False)) if a != b), None)
        if parted is not None:
            assert gap_at(engine, tokens, plain[:parted]) <= batch_noise(engine, tokens, plain)


def gap_at(engine: LocalEngine, tokens: Sequence[int], reply: Sequence[int]) -> float:
    """How far the best logit after `reply` is above the second, computed token by token."""
    context = engine._context
    context.clear()
    context.extend(tokens)
    for token in reply:
        context.advance([token], interruptible=False)
    best = np.sort(context.logits(0 if reply else -1))[-2:]
    return float(best[1] - best[0])


def batch_noise(engine: LocalEngine, tokens: Sequence[int], reply: Sequence[int]) -> float:
    """The largest change of a logit when tokens of a reply are computed eight at once instead of one by one."""
    context = engine._context
    rows = []
    for size in (1, 8):
        context.clear()
        context.extend(tokens)
        found = []
        for start in range(0, len(reply) // 8 * 8, size):
            context.advance(reply[start : start + size], interruptible=False)
            found += [context.logits(i).copy() for i in range(size)]
        rows.append(np.array(found))
    return float(np.abs(rows[0] - rows[1]).max())


def test_a_reply_that_ends_within_a_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Speculation, "_best_length", lambda self, draft: len(draft.tokens))
    with load(write_model("dense", tmp_path), OPTIONS) as engine:
        prompt = [5, 6, 7, 8] * 10
        sampling = Sampling(temperature=0.0, max_tokens=40)
        whole, accepted = ids(engine, prompt, sampling, speculate=True)
        assert accepted
        for n in range(1, 12):
            cut, _ = ids(engine, prompt, replace(sampling, max_tokens=n), speculate=True)
            assert cut == whole[:n]
            assert engine._context.held[: len(prompt)] == prompt
            assert len(engine._context.held) <= len(prompt) + n
        reply = engine.generate(prompt, sampling)
        for _ in range(6):
            next(reply)
        del reply  # in the middle of a draft, perhaps
        assert ids(engine, prompt, sampling, speculate=True)[0] == whole


@pytest.mark.usefixtures("eager")
def test_a_draft_model_changes_nothing_but_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is its own draft model here: greedily, all that it guesses is right."""
    monkeypatch.setattr(draft_model, "_LIMITS", (0.0, 0.6, 0.8, 0.95))  # random weights are sure of nothing
    path = write_model("dense", tmp_path)
    options = replace(OPTIONS, kv_types=("f32", "f32"))
    sampling = Sampling(temperature=0.0, max_tokens=60)
    with load(path, options) as engine, load(path, replace(options, draft=path)) as drafted:
        prompt = [5, 9, 7, 8, 12, 30]
        plain, _ = ids(engine, prompt, sampling, speculate=False)
        ours, accepted = ids(drafted, prompt, sampling, speculate=True)
        assert ours == plain
        assert accepted > 10
        warm = replace(sampling, temperature=1.0, seed=1)
        assert ids(drafted, prompt, warm, speculate=True)[0][:5] == ids(engine, prompt, warm, speculate=False)[0][:5]


def test_what_cannot_draft_is_a_named_error(tmp_path: Path, starter_model: Path) -> None:
    dense, recurrent = write_model("dense", tmp_path), write_model("recurrent", tmp_path)
    for model, draft, said in (
        (starter_model, dense, "vocabularies differ"),
        (dense, recurrent, "recurrent"),
        (recurrent, dense, "recurrent"),
        (dense, tmp_path / "missing.gguf", "missing"),
    ):
        with pytest.raises(HandmillError, match=said):
            load(model, replace(OPTIONS, draft=draft))
