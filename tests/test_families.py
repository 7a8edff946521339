"""The registry of families: what each claims, and that it is data which llama.cpp knows."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import statistics
import sys
from pathlib import Path
from types import ModuleType

import gguf
import pytest

import models.families
from models.errors import UnsupportedError
from models.families import ModelFamily, family_of, registry


@pytest.mark.parametrize(
    ("architecture", "gguf_arch"),
    [("LlamaForCausalLM", "llama"), ("MistralForCausalLM", "llama"), ("Qwen2ForCausalLM", "qwen2")],
)
def test_known_architectures(architecture: str, gguf_arch: str) -> None:
    assert family_of(architecture).gguf_arch == gguf_arch


def test_unknown_architecture_says_which_are_known() -> None:
    with pytest.raises(UnsupportedError, match="'GPT9ForCausalLM' is not supported") as raised:
        family_of("GPT9ForCausalLM")
    assert raised.value.architecture == "GPT9ForCausalLM"
    for known in registry():
        assert known in raised.value.hint


def test_names_are_quoted_and_cut() -> None:
    with pytest.raises(UnsupportedError) as raised:
        family_of("\x1b]0;owned\x07" + "x" * 10_000)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 200


def test_gguf_has_every_architecture() -> None:
    assert {family.gguf_arch for family in registry().values()} <= set(gguf.MODEL_ARCH_NAMES.values())


def test_half_of_the_families_cost_less_than_twenty_lines() -> None:
    assert statistics.median(lines_of_families()) < 20


def lines_of_families() -> list[int]:
    """Of the statement that makes each family; what it computes otherwise is beside it."""
    lines = []
    for info in pkgutil.iter_modules(models.families.__path__):
        module = importlib.import_module(f"models.families.{info.name}")
        for node in ast.parse(inspect.getsource(module)).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            if isinstance(target, ast.Name) and isinstance(vars(module).get(target.id), ModelFamily):
                lines.append((node.end_lineno or node.lineno) - node.lineno + 1)
    return lines


def test_two_families_may_not_claim_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.families, "__path__", [*models.families.__path__, str(tmp_path)])
    (tmp_path / "other.py").write_text("")
    other = ModuleType("models.families.other")
    vars(other)["OTHER"] = ModelFamily(architectures=("LlamaForCausalLM",), gguf_arch="llama")
    monkeypatch.setitem(sys.modules, "models.families.other", other)
    with pytest.raises(ValueError, match="two families claim LlamaForCausalLM"):
        registry.__wrapped__()
