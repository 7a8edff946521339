"""A tokenizer read in a process of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from convert import pipeline, reading
from convert.converter import convert_checkpoint
from convert.reading import reading_vocabulary
from convert.tokenizer import UnsupportedTokenizer, read_vocabulary
from models.errors import TokenizerError
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
    with reading_vocabulary(checkpoint, size, TEXTS) as vocabulary:
        assert vocabulary() == read_vocabulary(checkpoint, size, TEXTS)


def test_an_error_arrives_as_it_was_raised(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "vocab.txt").write_text("a")
    with reading_vocabulary(checkpoint, 10, TEXTS) as vocabulary, pytest.raises(UnsupportedTokenizer) as raised:
        vocabulary()
    assert "vocab.txt is a WordPiece tokenizer" in str(raised.value)
    assert raised.value.path == checkpoint


@pytest.mark.parametrize("end", ["os.abort()", "os._exit(0)", "raise SystemError"])
def test_a_process_that_breaks_is_a_named_error(checkpoint: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_CHILD", f"import os; {end}")
    with (
        reading_vocabulary(checkpoint, 10, TEXTS) as vocabulary,
        pytest.raises(TokenizerError, match="ended its process"),
    ):
        vocabulary()


def test_a_fault_of_ours_is_told(tmp_path: Path) -> None:
    with (
        reading_vocabulary(tmp_path, "ten", TEXTS) as vocabulary,  # type: ignore[arg-type]
        pytest.raises(TokenizerError, match="no tokenizer"),
    ):
        vocabulary()
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    with (
        reading_vocabulary(checkpoint, "ten", TEXTS) as vocabulary,  # type: ignore[arg-type]
        pytest.raises(TokenizerError, match="failed: TypeError"),
    ):
        vocabulary()


def test_a_process_that_does_not_end_is_ended(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_CHILD", "import time; time.sleep(1000)")
    monkeypatch.setattr(reading, "DEADLINE_SECONDS", 0.2)
    with reading_vocabulary(checkpoint, 10, TEXTS) as vocabulary, pytest.raises(TokenizerError) as raised:
        vocabulary()
    assert "longer than 0.2 s" in raised.value.hint


def test_an_interrupt_does_not_wait_for_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_CHILD", "import time; time.sleep(1000)")
    monkeypatch.setattr(pipeline, "_WAITING_BYTES", 0)

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "encoding":
            raise KeyboardInterrupt

    output = checkpoint.parent / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(checkpoint, output, progress=progress)
    assert not list(checkpoint.parent.glob("*out.gguf*"))


def test_the_process_does_not_outlive_the_block(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Watched(subprocess.Popen[bytes]):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[call-overload]
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Watched)
    monkeypatch.setattr(reading, "_CHILD", "import time; time.sleep(1000)")
    with pytest.raises(ZeroDivisionError), reading_vocabulary(checkpoint, 10, TEXTS):
        raise ZeroDivisionError
    assert started[0].returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(started[0].pid, 0)


def test_nothing_beside_the_working_directory_is_imported(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of the person's own called `models` is no package of ours."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    with reading_vocabulary(checkpoint, n_vocab(checkpoint), TEXTS) as vocabulary:
        assert vocabulary().tokens
