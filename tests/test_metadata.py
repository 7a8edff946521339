"""GGUF keys out of config, tokenizer, model card and generation_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from convert.checkpoint import open_checkpoint
from convert.converter import plan_conversion
from convert.metadata import build_metadata
from convert.special_tokens import SpecialTokens
from convert.tokenizer import TokenType, Vocabulary
from models.errors import CheckpointError
from models.families import family_of
from models.hparams import Hparams
from tests.checkpoints import edit_json, tiny_checkpoint, write_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "Tiny-Model-v2")


def metadata(folder: Path, vocabulary: Vocabulary | None = None) -> dict[str, Any]:
    checkpoint = open_checkpoint(folder)
    family = family_of(checkpoint.architecture)
    hparams = Hparams(checkpoint.config, family.defaults)
    keys = build_metadata(checkpoint, family, hparams, shapes={"w": (115_520,)}, file_type=15, vocabulary=vocabulary)
    return {name: entry.value for name, entry in keys.items()}


def vocabulary_of(n_vocab: int, special: SpecialTokens | None = None) -> Vocabulary:
    tokens = [f"t{i}".encode() for i in range(n_vocab)]
    types = [int(TokenType.NORMAL)] * n_vocab
    return Vocabulary("gpt2", "gpt-2", tokens, types, special or SpecialTokens(), merges=[b"t 1"])


def test_hparams(folder: Path) -> None:
    keys = metadata(folder)
    assert {name: value for name, value in keys.items() if name.startswith("llama.")} == {
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.vocab_size": 320,
        "llama.rope.dimension_count": 16,
    }
    assert (keys["general.architecture"], keys["general.file_type"]) == ("llama", 15)
    assert (keys["general.quantization_version"], keys["tokenizer.ggml.model"]) == (2, "no_vocab")


def test_qwen2_writes_no_head_size_unless_it_is_given(tmp_path: Path) -> None:
    plain = tiny_checkpoint(tmp_path / "plain", "Qwen2ForCausalLM")
    assert not [key for key in metadata(plain, vocabulary_of(320)) if "_length" in key and "attention" in key]
    given = tiny_checkpoint(tmp_path / "given", "Qwen2ForCausalLM", head_dim=16)
    assert metadata(given)["qwen2.attention.key_length"] == 16


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, {}),
        ({"rope_type": "llama3"}, {}),
        ({"rope_type": "linear", "factor": 2}, {"type": "linear", "factor": 2.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5},
            {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_attn_factor": 1.5},
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16,
             "beta_slow": 2, "extrapolation_factor": 0.5},
            {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_beta_fast": 16.0,
             "yarn_beta_slow": 2.0, "yarn_ext_factor": 0.5},
        ),
    ],
)  # fmt: skip
def test_rope_scaling(rope: dict[str, Any], expected: dict[str, Any], folder: Path) -> None:
    scaling = {**rope, "rope_theta": 500000.0}
    edit_json(folder / "config.json", lambda config: config.update(rope_parameters=scaling))
    keys = metadata(folder)
    found = {name.rpartition(".")[2]: value for name, value in keys.items() if ".rope.scaling." in name}
    assert found == expected
    assert keys["llama.rope.freq_base"] == 500000.0


@pytest.mark.parametrize("rope", [{"rope_type": "linear"}, {"rope_type": "yarn", "factor": 2.0}])
def test_scaling_without_what_it_needs(rope: dict[str, Any], folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(rope_parameters=rope))
    with pytest.raises(CheckpointError, match=r"'rope_parameters\..*' is missing"):
        metadata(folder)


# The vocabulary


def test_special_tokens_and_flags(folder: Path) -> None:
    special = SpecialTokens(ids={"bos": 1, "eos": 2, "cls": 3, "pad": 999}, add={"bos": True, "eos": False})
    keys = metadata(folder, vocabulary_of(320, special))
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (True, False)
    # an id outside the vocabulary would end llama.cpp; "cls" is no key of its own
    assert not [key for key in keys if "padding" in key or "cls" in key]


def test_code_llama_ends_a_turn_at_a_token_of_its_own(folder: Path) -> None:
    """Its other marks have no key that llama.cpp reads: its own converter leaves them out, too."""
    assert metadata(folder, vocabulary_of(32016))["tokenizer.ggml.eot_token_id"] == 32010
    assert "tokenizer.ggml.eot_token_id" not in metadata(folder, vocabulary_of(32000))


@pytest.mark.parametrize(
    ("n_vocab", "add", "expected"),
    [(49152, {}, False), (49152, {"bos": True}, True), (49152, {"bos": False}, False), (49153, {}, None)],
)
def test_49152_tokens_begin_without_bos(
    n_vocab: int, add: dict[str, bool], expected: bool | None, folder: Path
) -> None:
    keys = metadata(folder, vocabulary_of(n_vocab, SpecialTokens(add=add)))
    assert keys.get("tokenizer.ggml.add_bos_token") is expected


def test_named_templates(folder: Path) -> None:
    named = [{"name": name, "template": f"of {name}"} for name in ("default", "tool_use", "rag")]
    keys = metadata(folder, vocabulary_of(320, SpecialTokens(chat_template=named)))
    assert keys["tokenizer.chat_template"] == "of default"
    assert keys["tokenizer.chat_template.rag"] == "of rag"
    assert keys["tokenizer.chat_templates"] == ["rag", "tool_use"]


# Names and recommendations


def test_names_follow_from_the_folder(folder: Path) -> None:
    keys = metadata(folder)
    assert keys["general.name"] == "Tiny Model v2"
    assert keys["general.size_label"]


def test_recommended_sampling(folder: Path) -> None:
    write_json(
        folder / "generation_config.json",
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0, "repetition_penalty": 1.05, "do_sample": True},
    )
    keys = metadata(folder)
    assert {name.split(".")[-1]: value for name, value in keys.items() if name.startswith("general.sampling.")} == {
        "temp": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0,
        "penalty_repeat": 1.05,
    }


@pytest.mark.parametrize(
    "value", [True, "0.6", [0.6], {}, float("nan"), float("inf"), 1e39, 10**400, -(10**400)], ids=lambda v: str(v)[:9]
)
def test_recommendations_that_are_none(value: object, folder: Path) -> None:
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    write_json(folder / "generation_config.json", dict.fromkeys(names, value))
    assert not [name for name in metadata(folder) if name.startswith("general.sampling.")]


def test_model_card(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n- zh\n---\n# Tiny\n")
    keys = metadata(folder)
    assert (keys["general.license"], keys["general.languages"]) == ("apache-2.0", ["en", "zh"])


@pytest.mark.parametrize(
    "card",
    [
        b"---\nlicense: [\n---\n",
        b"---\n- a\n- b\n---\n",
        b"---\nlicense: {a: b}\ntags: 3\nbase_model: 7\n---\n",
        b"---\n\xff\xfe\n---\n",
        b"---\n" + b"[" * 5000 + b"\n---\n",
        b"---\n? !!python/object/apply:os.system ['true']\n---\n",
        b"---\nbase_model: [[], {}]\nlanguage: {}\n---\n",
    ],
    ids=["cut", "list", "wrong-kinds", "not-text", "deep", "python", "nested"],
)
def test_a_broken_model_card_costs_no_conversion(card: bytes, folder: Path) -> None:
    (folder / "README.md").write_bytes(card)
    assert metadata(folder)["general.architecture"] == "llama"


@pytest.mark.parametrize(
    "field",
    ["tags: [a, 2024, [b], {c: d}]", "license: 3", "license_name: {a: b}", "tags: [[a], [b]]", "language: {en: 1}",
     "base_model: [3, {name: x}]", "datasets: 2024-01-01", "author: true"],
)  # fmt: skip
def test_odd_fields_of_a_model_card_cost_no_conversion(field: str, folder: Path) -> None:
    (folder / "README.md").write_text(f"---\n{field}\nlicense_link: kept\n---\n")
    plan = plan_conversion(folder)
    assert plan.header.startswith(b"GGUF")
    assert b"kept" in plan.header
