"""A tokenizer read in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from convert import pipeline, reading
from convert.converter import convert_checkpoint
from convert.reading import vocabulary_of
from convert.tokenizer import UnsupportedTokenizer, read_vocabulary
from models.errors import TokenizerError
from models.isolated import isolation
from tests.checkpoints import tiny_checkpoint

TEXTS = ("one text", "另一个")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "tiny")


def n_vocab(checkpoint: Path) -> int:
    from convert.checkpoint import open_checkpoint

    size = open_checkpoint(checkpoint).config["vocab_size"]
    assert isinstance(size, int)
    return size


def test_the_answer_is_that_of_this_process(checkpoint: Path) -> None:
    size = n_vocab(checkpoint)
    with isolation() as isolated:
        assert vocabulary_of(isolated, checkpoint, size, TEXTS) == read_vocabulary(checkpoint, size, TEXTS)


def test_an_error_arrives_as_it_was_raised(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "vocab.txt").write_text("a")
    with isolation() as isolated, pytest.raises(UnsupportedTokenizer) as raised:
        vocabulary_of(isolated, checkpoint, 10, TEXTS)
    assert "vocab.txt is a WordPiece tokenizer" in str(raised.value)
    assert raised.value.path == checkpoint


def _abort(*_: object) -> None:
    os.abort()


def test_a_process_that_breaks_is_a_named_error(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_read", _abort)
    with isolation() as isolated, pytest.raises(TokenizerError, match=r"tokenizer in .*tiny failed: .*SIGABRT"):
        vocabulary_of(isolated, checkpoint, 10, TEXTS)


def test_a_fault_of_ours_is_told(checkpoint: Path) -> None:
    with isolation() as isolated, pytest.raises(TokenizerError, match="failed: TypeError"):
        vocabulary_of(isolated, checkpoint, "ten", TEXTS)  # type: ignore[arg-type]


def _sleep(*_: object) -> None:
    import time

    time.sleep(1000)


def test_an_interrupt_does_not_wait_for_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_read", _sleep)
    monkeypatch.setattr(pipeline, "_WAITING_BYTES", 0)

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "encoding":
            raise KeyboardInterrupt

    output = checkpoint.parent / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(checkpoint, output, progress=progress)
    assert not list(checkpoint.parent.glob("*out.gguf*"))
