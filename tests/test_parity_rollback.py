"""Recurrent families as transformers makes them: what is computed on trial is taken back exactly, or never tried."""

from __future__ import annotations

from pathlib import Path

import pytest

from convert.converter import convert_checkpoint
from convert.file_types import file_type
from runner.engine.local import load
from runner.engine.protocol import LoadOptions
from tests.family_cases import CASES
from tests.family_checkpoints import make_checkpoint
from tests.memory_models import assert_taken_back

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(
    ("name", "most_drafted"),
    [
        ("qwen3.5", 7),
        ("qwen3.5-moe", 7),
        ("lfm2-moe", 7),
        ("nemotron-h-moe", 7),
        ("falcon-h1", 0),
        ("granite-hybrid", 0),
        ("qwen3-next", 0),
        ("mamba2", 0),
    ],
)
def test_what_was_on_trial(name: str, most_drafted: int, tmp_path: Path, starter_model: Path) -> None:
    make_checkpoint(CASES[name], tmp_path / "checkpoint", starter_model)
    path = convert_checkpoint(tmp_path / "checkpoint", tmp_path / "ours.gguf", file_type("F32")).path
    with load(path, LoadOptions(context=512, gpu_layers=0, threads=1, cache=0, kv_types=("f32", "f32"))) as engine:
        context = engine.context
        assert context.most_drafted == most_drafted
        if most_drafted:
            assert_taken_back(context)
