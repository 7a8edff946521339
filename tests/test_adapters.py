"""LoRA adapters at load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from convert.adapter import convert_adapter
from convert.converter import convert_checkpoint
from convert.file_types import file_type
from convert.quantize import F32
from models.errors import LoadError, UsageError
from runner.engine.local import load
from runner.engine.protocol import LoadOptions
from tests.adapters import write_adapter
from tests.checkpoints import tiny_checkpoint

OPTIONS = LoadOptions(context=64, gpu_layers=0, threads=1, cache=0, repack=False)
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "base", dtype="F32")


def converted(base: Path, folder: Path, name: str) -> Path:
    write_adapter(folder / name, {MODULE: (64, 64), f"model.layers.1.mlp.{name}_proj": (128, 64)})
    return convert_adapter(folder / name, base, folder / f"{name}.gguf", F32).path


def logits(model: Path, *loras: tuple[Path, float]) -> NDArray[np.float32]:
    with load(model, replace(OPTIONS, loras=loras)) as engine:
        context = engine.context
        context.extend([1, 17, 93, 208])
        return context.logits().copy()


def test_adapters_add_up_by_their_scales(base: Path, tmp_path: Path) -> None:
    model = convert_checkpoint(base, tmp_path / "model.gguf", file_type("F32")).path
    one, two = converted(base, tmp_path, "up"), converted(base, tmp_path, "gate")
    plain = logits(model)
    np.testing.assert_allclose(logits(model, (one, 0.0)), plain, atol=1e-5)
    found = [logits(model, (one, 1.0)), logits(model, (one, 0.5)), logits(model, (one, 1.0), (two, 1.0))]
    for i, values in enumerate([plain, *found]):
        for other in found[i:]:
            assert np.abs(values - other).max() > 1e-3
    folded = convert_checkpoint(base, tmp_path / "folded.gguf", file_type("F32"), adapter=tmp_path / "up").path
    np.testing.assert_allclose(logits(folded), found[0], atol=1e-3)


def test_what_is_no_adapter_of_this_model(base: Path, tmp_path: Path) -> None:
    model = convert_checkpoint(base, tmp_path / "model.gguf", file_type("F32")).path
    wide = tiny_checkpoint(tmp_path / "wide", dtype="F32", hidden_size=128, intermediate_size=128)
    write_adapter(tmp_path / "other", {MODULE: (128, 128)})
    other = convert_adapter(tmp_path / "other", wide, tmp_path / "other.gguf", F32).path
    text = tmp_path / "text.gguf"
    text.write_text("no adapter")
    for path in (other, text, tmp_path / "missing.gguf", model):
        with pytest.raises(LoadError, match="adapter"):
            logits(model, (path, 1.0))
    with pytest.raises(UsageError, match="scale"):
        logits(model, (converted(base, tmp_path, "up"), float("nan")))
