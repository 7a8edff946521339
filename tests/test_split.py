"""`--split-size`: parts that llama.cpp loads from the first, the whole set or nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.gguf_file import read_gguf
from models.native import forward_pass
from runner.cli.main import main
from tests.checkpoints import tiny_checkpoint

IDS = [1, 17, 93, 208, 44, 5]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "tiny")


def convert(source: Path, output: Path, *options: str) -> int:
    return main(["convert", str(source), "-o", str(output), "-t", "F16", "-q", *options])


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


@pytest.mark.parametrize("from_gguf", [False, True])
def test_the_parts_compute_what_the_whole_does(checkpoint: Path, tmp_path: Path, from_gguf: bool) -> None:
    whole, folder = tmp_path / "whole.gguf", tmp_path / "parts"
    folder.mkdir()
    assert convert(checkpoint, whole) == 0
    assert convert(whole if from_gguf else checkpoint, folder / "m.gguf", "--split-size", "60K") == 0
    names = parts(folder)
    count = len(names)
    assert count > 2
    assert names == [f"m-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    keys = [read_gguf(folder / name).metadata for name in names]
    assert [key["split.no"] for key in keys] == list(range(count))
    assert {key["split.count"] for key in keys} == {count}
    assert "general.architecture" in keys[0]
    expected = forward_pass(whole, IDS, threads=1)
    np.testing.assert_array_equal(forward_pass(folder / names[0], IDS, threads=1), expected)


def test_a_set_is_kept_unless_forced(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for force, code in (((), 0), ((), 1), (("--force",), 0)):
        assert convert(checkpoint, folder / "m.gguf", "--split-size", "60K", *force) == code
    assert "is already there" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["1K", "0", "-4G", "4X", "", "1e400"])
def test_sizes_that_make_no_sense_leave_nothing(
    checkpoint: Path, tmp_path: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    assert convert(checkpoint, folder / "m.gguf", f"--split-size={size}") in (1, 2)
    assert "--split-size" in capsys.readouterr().err
    assert parts(folder) == []
