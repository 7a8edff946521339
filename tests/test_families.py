"""The registry of families: what each claims, and that it is data which llama.cpp knows."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import gguf
import pytest

import models.families
from models.errors import UnsupportedError
from models.families import ModelFamily, family_of, registry

SHARED = ("keys", "passes", "vocabulary")
"""Modules that are no family: what families are made of."""


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


def test_a_family_costs_a_few_lines() -> None:
    """Comments, docstrings and imports included, over all that are there."""
    lines = sum(len(path.read_text().splitlines()) for path in Path(models.families.__path__[0]).glob("[a-z]*.py"))
    lines -= sum(len((Path(models.families.__path__[0]) / f"{name}.py").read_text().splitlines()) for name in SHARED)
    assert lines < 20 * len({id(family) for family in registry().values()})


def test_two_families_may_not_claim_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.families, "__path__", [*models.families.__path__, str(tmp_path)])
    (tmp_path / "other.py").write_text("")
    other = ModuleType("models.families.other")
    vars(other)["OTHER"] = ModelFamily(architectures=("LlamaForCausalLM",), gguf_arch="llama")
    monkeypatch.setitem(sys.modules, "models.families.other", other)
    with pytest.raises(ValueError, match="two families claim LlamaForCausalLM"):
        registry.__wrapped__()
