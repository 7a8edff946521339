"""The main job: a sharded checkpoint becomes a GGUF file that llama.cpp runs, and its self-check."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.check import LIMIT_TEXTS
from convert.converter import convert_checkpoint, plan_conversion
from convert.file_types import file_type
from models.errors import CheckFailed, OutputError, TensorError
from models.gguf_file import LazyArray, read_gguf
from models.native import forward_pass, open_vocabulary
from runner.engine.local import load
from runner.engine.protocol import LoadOptions, Sampling
from tests.checkpoints import (
    Dtype,
    Json,
    Tensors,
    edit_json,
    spell_as_transformers_4,
    starter_checkpoint,
    tiny_checkpoint,
    tiny_config,
    tiny_tensors,
    tiny_tokenizer,
    write_json,
    write_shards,
)

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def smollm2(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole of SmolLM2-135M-Instruct in three bf16 shards, as transformers 5 writes it."""
    return starter_checkpoint(tmp_path_factory.mktemp("five") / "SmolLM2", starter_model)


def reply(path: Path, n_tokens: int = 4) -> str:
    """How the model continues PROMPT, greedily."""
    with load(path, LoadOptions(gpu_layers=0, context=256)) as engine:
        chunks = engine.generate(engine.encode_text(PROMPT), Sampling(temperature=0.0, max_tokens=n_tokens))
        return "".join(chunk.text for chunk in chunks)


def files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# A real model


@pytest.mark.parametrize(("name", "at_least"), [("Q8_0", 0.99), ("Q4_K_M", 0.95)])
def test_a_real_model_says_what_its_source_says(
    smollm2: Path, starter_model: Path, name: str, at_least: float, tmp_path: Path
) -> None:
    output = tmp_path / "out.gguf"
    report = convert_checkpoint(smollm2, output, file_type(name))
    assert report.warnings == []
    assert reply(output) == reply(starter_model)
    texts = ("def f(x):\n    return 12345 # 请解释 🙂 <|im_end|>", "The capital of France is", "One, two, three")
    with open_vocabulary(output) as ours, open_vocabulary(starter_model) as theirs:
        ids = [ours.tokenize(text, add_special=True, parse_special=True) for text in texts]
        assert ids == [theirs.tokenize(text, add_special=True, parse_special=True) for text in texts]
        assert ours.add_bos is theirs.add_bos is False
        assert (ours.bos, ours.eos) == (theirs.bos, theirs.eos)
    cosines = []
    for tokens in ids:  # a single place may lie to either side, as the processor rounds
        a, b = (forward_pass(path, tokens, threads=2) for path in (output, starter_model))
        cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert np.mean(cosines) > at_least


def test_a_real_model_keeps_its_metadata(smollm2: Path, starter_model: Path) -> None:
    plan = plan_conversion(smollm2, file_type("Q4_K_M"))
    path = smollm2.parent / "header.gguf"
    path.write_bytes(plan.header)
    with path.open("r+b") as file:
        file.truncate(plan.n_bytes)
    ours, theirs = read_gguf(path), read_gguf(starter_model)
    for key in (key for key in theirs.metadata if not key.startswith("general.")):
        a, b = ours.metadata[key], theirs.metadata[key]
        same = list(a) == list(b) if isinstance(a, LazyArray) and isinstance(b, LazyArray) else a == b
        assert same, key
    assert ours.metadata["tokenizer.ggml.pre"] == "smollm"
    assert {t.name: t.shape for t in ours.tensors} == {t.name: t.shape for t in theirs.tensors}
    path.unlink()


def test_both_spellings_give_the_same_file(starter_model: Path, tmp_path: Path) -> None:
    five = starter_checkpoint(tmp_path / "five" / "SmolLM2", starter_model, blocks=1)
    convert_checkpoint(five, tmp_path / "five.gguf", file_type("Q4_0"), check=False)
    four = spell_as_transformers_4(shutil.copytree(five, tmp_path / "four" / "SmolLM2"))
    convert_checkpoint(four, tmp_path / "four.gguf", file_type("Q4_0"), check=False)
    assert (tmp_path / "four.gguf").read_bytes() == (tmp_path / "five.gguf").read_bytes()


# Tiny ones


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_families_and_dtypes(architecture: str, dtype: Dtype, tmp_path: Path) -> None:
    """The file runs, and its F32 weights are those of the checkpoint."""
    checkpoint = tiny_checkpoint(tmp_path / "tiny", architecture, dtype=dtype, tie_word_embeddings=dtype == "F16")
    output = tmp_path / "out.gguf"
    report = convert_checkpoint(checkpoint, output, file_type("F32"))
    assert (report.path, report.checked, report.plan.n_bytes) == (output, True, output.stat().st_size)
    file, data = read_gguf(output), output.read_bytes()
    config = tiny_config(architecture, tie_word_embeddings=dtype == "F16")
    embedding = tiny_tensors(config, dtype)["model.embed_tokens.weight"]
    wide = embedding.astype(np.uint32) << 16 if dtype == "BF16" else embedding.astype(np.float32)
    [written] = [t for t in file.tensors if t.name == "token_embd.weight"]
    assert data[written.offset : written.offset + written.nbytes] == wide.tobytes()
    assert file.metadata["general.architecture"] == ("qwen2" if "Qwen2" in architecture else "llama")
    logits = forward_pass(output, [1, 5, 9], threads=1)
    assert logits.shape == (320,)
    assert np.ptp(logits) > 0.01


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
    ],
    ids=lambda rope: str(rope["rope_type"]),
)  # fmt: skip
def test_rope_scalings_in_both_spellings(rope: Json, tmp_path: Path) -> None:
    fields: Json = {"rope_parameters": {**rope, "rope_theta": 10000.0}}
    five = tiny_checkpoint(tmp_path / "five" / "tiny", **fields)
    four = spell_as_transformers_4(tiny_checkpoint(tmp_path / "four" / "tiny", **fields))
    plain = tiny_checkpoint(tmp_path / "plain" / "tiny")
    outputs = [tmp_path / f"{folder.parent.name}.gguf" for folder in (five, four, plain)]
    for checkpoint, output in zip((five, four, plain), outputs, strict=True):
        convert_checkpoint(checkpoint, output, file_type("F32"))
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    scaled, unscaled = (forward_pass(output, list(range(200)), threads=2) for output in (outputs[0], outputs[2]))
    assert np.abs(scaled - unscaled).max() > 1e-3


def test_the_number_of_threads_and_shards_changes_nothing(tmp_path: Path) -> None:
    written = set()
    for shards in (1, 2, 5):
        checkpoint = tiny_checkpoint(tmp_path / str(shards) / "tiny", shards=shards, vocab_size=1300)
        for threads in (1, 3):
            output = tmp_path / "out.gguf"
            convert_checkpoint(checkpoint, output, file_type("Q8_0"), threads=threads, force=True, check=False)
            written.add(output.read_bytes())
    assert len(written) == 1


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    report = convert_checkpoint(checkpoint, tmp_path / "out.gguf", progress=lambda *step: seen.append(step))
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == ["planning", "encoding", "checking"]
    done = [n for stage, n, _ in seen if stage == "encoding"]
    assert done == sorted(done)
    assert seen[-1] == ("checking", report.plan.source_bytes, report.plan.source_bytes)


def test_the_plan_adds_up(tmp_path: Path) -> None:
    plan = plan_conversion(tiny_checkpoint(tmp_path / "tiny"), file_type("Q8_0"))
    assert plan.n_weights == sum(math.prod(array.shape) for array in tiny_tensors(tiny_config()).values())
    assert [total.n_bytes for total in plan.totals] == sorted((t.n_bytes for t in plan.totals), reverse=True)
    assert sum(total.n_tensors for total in plan.totals) == len(plan.tensors)
    assert 8.5 < plan.bits_per_weight < 9
    assert files(tmp_path) == ["tiny"]


# Weights that cannot be


def damaged(folder: Path, name: str, value: float, dtype: Dtype = "BF16", **fields: Any) -> Path:
    """A checkpoint with one bad value at the end of one tensor."""
    checkpoint = tiny_checkpoint(folder, dtype=dtype, **fields)
    config = tiny_config(**fields)
    tensors: Tensors = tiny_tensors(config, dtype)
    flat = tensors[name].reshape(-1)
    flat[-1] = np.array([value], np.float32).view(np.uint32)[0] >> 16 if dtype == "BF16" else value
    write_shards(checkpoint, tensors, 2)
    return checkpoint


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_nan_and_infinity_name_the_tensor(name: str, value: float, dtype: Dtype, tmp_path: Path) -> None:
    checkpoint = damaged(tmp_path / "tiny", name, value, dtype)
    with pytest.raises(
        TensorError, match=f"'{name}' in model-0000.-of-00002.safetensors: it holds NaN or inf"
    ) as raised:
        convert_checkpoint(checkpoint, tmp_path / "out.gguf")
    assert raised.value.tensor == name
    assert files(tmp_path) == ["tiny"]


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_K_M"])
def test_weights_beyond_a_type_name_it(name: str, tmp_path: Path) -> None:
    tensor = "model.layers.0.mlp.up_proj.weight"
    checkpoint = damaged(tmp_path / "tiny", tensor, 1e30, "F32", hidden_size=256)
    with pytest.raises(TensorError, match=f"'{tensor}' .*its values do not fit ") as raised:
        convert_checkpoint(checkpoint, tmp_path / "out.gguf", file_type(name))
    assert "Choose another --type" in raised.value.hint
    assert files(tmp_path) == ["tiny"]


def test_logits_that_are_not_finite_fail_the_check(tmp_path: Path) -> None:
    checkpoint = damaged(tmp_path / "tiny", "model.norm.weight", 3e38, "F32")
    with pytest.raises(CheckFailed, match="NaN or infinite logits"):
        convert_checkpoint(checkpoint, tmp_path / "out.gguf")
    assert files(tmp_path) == ["tiny"]


# The self-check


def with_tokenizer(folder: Path, change: Callable[[Json], object]) -> Path:
    checkpoint = tiny_checkpoint(folder)
    tokenizer = tiny_tokenizer()
    change(tokenizer)
    write_json(checkpoint / "tokenizer.json", tokenizer)
    return checkpoint


def normalize(kind: str) -> Callable[[Json], object]:
    return lambda tokenizer: tokenizer["normalizer"]["normalizers"].insert(0, {"type": kind})


def test_a_tokenizer_that_llama_cpp_reads_otherwise_fails(tmp_path: Path) -> None:
    checkpoint = with_tokenizer(tmp_path / "tiny", normalize("Lowercase"))
    with pytest.raises(CheckFailed, match=r"tokenizes 'Hello, world!.* to other ids .* instead of ") as raised:
        convert_checkpoint(checkpoint, tmp_path / "out.gguf")
    assert "--no-check" in raised.value.hint
    assert files(tmp_path) == ["tiny"]
    report = convert_checkpoint(checkpoint, tmp_path / "out.gguf", check=False)
    assert (report.checked, files(tmp_path)) == (False, ["out.gguf", "tiny"])


def test_decomposed_accents_are_a_warning(tmp_path: Path) -> None:
    checkpoint = with_tokenizer(tmp_path / "tiny", normalize("NFC"))
    report = convert_checkpoint(checkpoint, tmp_path / "out.gguf")
    [warning] = report.warnings
    assert repr(LIMIT_TEXTS[0]) in warning
    assert files(tmp_path) == ["out.gguf", "tiny"]


def test_a_model_without_a_chat_template_says_so(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    edit_json(checkpoint / "tokenizer_config.json", lambda config: config.pop("chat_template"))
    [warning] = convert_checkpoint(checkpoint, tmp_path / "out.gguf").warnings
    assert "no chat template" in warning


# The folder


def test_a_bad_output_is_said_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such folder"):
        convert_checkpoint(tmp_path / "no checkpoint", tmp_path / "no folder" / "out.gguf")


def test_a_window_that_llama_cpp_does_not_compute_is_told(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    edit_json(checkpoint / "config.json", lambda config: config.update(sliding_window=64))
    assert any("looks back 64 tokens" in warning for warning in plan_conversion(checkpoint).warnings)
    edit_json(checkpoint / "config.json", lambda config: config.update(use_sliding_window=False))  # as Qwen2 has it
    assert not any("looks back" in warning for warning in plan_conversion(checkpoint).warnings)
