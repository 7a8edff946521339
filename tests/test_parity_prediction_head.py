"""A model's own head for the token after the next: it drafts, and changes nothing but the time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from convert.converter import convert_checkpoint
from convert.file_types import file_type
from runner.engine import draft_model
from runner.engine.local import LocalEngine, load
from runner.engine.prediction_head import PredictionHead
from runner.engine.protocol import LoadOptions, Sampling
from runner.engine.speculation import Speculation
from tests.family_cases import CASES
from tests.family_checkpoints import make_checkpoint

pytestmark = pytest.mark.parity

OPTIONS = LoadOptions(context=512, gpu_layers=0, threads=1, cache=0, kv_types=("f32", "f32"))
PROMPT = [*range(20, 90)]


@pytest.fixture(scope="module", params=["qwen3.5-mtp", "glm4-moe-mtp"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, starter_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("head")
    make_checkpoint(CASES[request.param], folder / "checkpoint", starter_model)
    return convert_checkpoint(folder / "checkpoint", folder / "ours.gguf", file_type("F32")).path


@pytest.fixture
def engine(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalEngine]:
    # A head of random weights is never sure: let it say what it would, and have it checked.
    monkeypatch.setattr(draft_model, "_LIMITS", (0.0,) * 4)
    monkeypatch.setattr(Speculation, "_best_length", lambda self, draft: len(draft.tokens))
    with load(path, OPTIONS) as loaded:
        yield loaded


def head_of(engine: LocalEngine) -> PredictionHead:
    speculation = engine._loaded.speculation
    assert speculation is not None
    assert isinstance(speculation.drafter, PredictionHead)
    return speculation.drafter


def reply(engine: LocalEngine, tokens: list[int], n: int = 40) -> tuple[list[int], int]:
    chunks = list(engine.generate(tokens, Sampling(temperature=1.0, top_k=3, seed=7, max_tokens=n)))
    return [chunk.token for chunk in chunks if chunk.token is not None], chunks[-1].stats.drafted_tokens


def test_replies_are_the_same(engine: LocalEngine, path: Path) -> None:
    head_of(engine)
    ours, drafted = reply(engine, PROMPT)
    assert drafted > 20
    with load(path, LoadOptions(**{**OPTIONS.__dict__, "speculate": False})) as plain:
        assert reply(plain, PROMPT) == (ours, 0)


def test_it_guesses_the_same_however_the_text_came(engine: LocalEngine) -> None:
    head, context = head_of(engine), engine.context
    text = [*PROMPT, 11, 12, 13, 14, 15]

    def guessed() -> list[int]:
        head.begin(text)
        return list(head.draft(4).tokens)

    context.extend(text[:-1])
    fresh = guessed()
    assert len(fresh) == 4
    assert guessed() == fresh  # what it held of its own guesses is taken back
    # in pieces, with tokens on trial that are taken back
    context.clear()
    context.extend(PROMPT[:30])
    context.extend(PROMPT[30:])
    context.advance([11, 12, 99, 98], interruptible=False)
    context.truncate(len(PROMPT) + 2)
    context.advance([13], interruptible=False)
    context.advance([14], interruptible=False)
    assert context.held == text[:-1]
    assert guessed() == fresh
    # after another text in between
    other, _ = reply(engine, [*range(200, 260)])
    assert other
    context.clear()
    context.extend(text[:-1])
    assert guessed() == fresh


def test_what_it_has_not_seen_is_not_guessed_on(engine: LocalEngine) -> None:
    head, context = head_of(engine), engine.context
    context.extend(PROMPT)
    kept = context.snapshot()
    assert kept is not None
    assert context.restore(kept)
    head.begin([*PROMPT, 5])
    assert not head.draft(4).tokens
    assert len(reply(engine, [*PROMPT, 5, 6])[0]) == 40
