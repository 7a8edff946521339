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
from models.errors import CheckpointError, UnsupportedError
from models.families import ModelFamily, family_of, registry
from models.families.keys import COMMON
from tests.family_cases import CASES


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


def test_sparse_attention_is_said_to_be_computed_as_dense() -> None:
    family = family_of("MiniCPMForCausalLM")
    assert family.note(family.hparams({})) is None
    note = family.note(family.hparams({"sparse_config": {"dense_len": 8192}}))
    assert note is not None
    assert "up to 8192 tokens" in note


WITHOUT_CASE = {
    "Gemma3nForConditionalGeneration": "its text part is that of Gemma3nForCausalLM",
    "PhimoeForCausalLM": "transformers' name of PhiMoEForCausalLM",
}

FAMILIES = """
    apertus baichuan bloom chatglm cohere2 command-r deepseek deepseek2 ernie4_5 ernie4_5-moe exaone4 falcon falcon-h1
    gemma gemma2 gemma3 gemma3n gemma4 glm4 glm4moe gpt-oss gpt2 gptneox granite granitehybrid granitemoe hunyuan-dense
    internlm2 lfm2 lfm2moe llama llama4 mamba mamba2 minicpm mistral3 mpt nemotron nemotron_h olmo olmo2 olmoe orion
    phi2 phi3 phimoe qwen qwen2 qwen2moe qwen3 qwen35 qwen35moe qwen3moe qwen3next seed_oss smollm3 stablelm starcoder
    starcoder2 xverse
""".split()  # noqa: SIM905
"""llama.cpp's names of what people run."""


def test_every_architecture_has_a_case_against_transformers() -> None:
    assert registry().keys() - {case.architecture for case in CASES.values()} == set(WITHOUT_CASE)


def test_what_people_run_is_there() -> None:
    assert set(FAMILIES) <= {family.gguf_arch for family in registry().values()}


def longrope(trained: float) -> dict[str, object]:
    return {"type": "longrope", "original_max_position_embeddings": trained}


@pytest.mark.parametrize(
    ("architecture", "key", "fields"),
    [
        ("HunYuanDenseV1ForCausalLM", "rope.freq_base", {"rope_scaling": {"type": "dynamic", "alpha": -5.5}}),
        ("HunYuanDenseV1ForCausalLM", "rope.freq_base", {"rope_scaling": {"type": "dynamic"}, "head_dim": 2}),
        ("HunYuanMoEV1ForCausalLM", "rope.freq_base", {"rope_scaling": {"type": "dynamic", "alpha": 1e300}}),
        ("MPTForCausalLM", "attention.head_count_kv", {"attn_config": {"kv_n_heads": -1}}),
        ("MPTForCausalLM", "attention.head_count_kv", {"attn_config": {"kv_n_heads": "2"}}),
        ("Phi3ForCausalLM", "rope.scaling.attn_factor", {"rope_scaling": longrope(1)}),
        ("Phi3ForCausalLM", "rope.scaling.original_context_length", {"rope_scaling": longrope(1e30)}),
    ],
)
def test_numbers_that_make_no_model_are_refused(architecture: str, key: str, fields: dict[str, object]) -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 256}
    family = family_of(architecture)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        {**COMMON, **family.keys}[key](family.hparams({**config, **fields}))


def phi_moe(short: float, long: float) -> dict[str, object]:
    scaling = {**longrope(64), "short_mscale": short, "long_mscale": long}
    return {"max_position_embeddings": 256, "rope_scaling": scaling}


def test_phi_moe_says_itself_what_its_rope_is_multiplied_by() -> None:
    family = family_of("PhiMoEForCausalLM")
    factor = family.keys["rope.scaling.attn_factor"]
    assert factor(family.hparams(phi_moe(1.25, 1.25))) == 1.25
    assert factor(family.hparams({"max_position_embeddings": 256})) is None
    with pytest.raises(UnsupportedError, match=r"'short_mscale' is 1 and 'long_mscale' 1\.25"):
        factor(family.hparams(phi_moe(1.0, 1.25)))


def test_two_families_may_not_claim_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.families, "__path__", [*models.families.__path__, str(tmp_path)])
    (tmp_path / "other.py").write_text("")
    other = ModuleType("models.families.other")
    vars(other)["OTHER"] = ModelFamily(architectures=("LlamaForCausalLM",), gguf_arch="llama")
    monkeypatch.setitem(sys.modules, "models.families.other", other)
    with pytest.raises(ValueError, match="two families claim LlamaForCausalLM"):
        registry.__wrapped__()
