"""LoRA adapters: folded into a model, and beside it in llama.cpp, they give the model that peft would merge."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.checkpoint import read_header
from convert.converter import convert_checkpoint
from convert.file_types import file_type
from convert.lora import open_adapter
from convert.quantize import F32
from convert.stored import stored
from convert.tensor_info import DTYPE_BYTES
from models.errors import CheckpointError, TensorError, UnsupportedError
from models.gguf_file import read_gguf
from models.native import forward_pass
from runner.cli.main import main
from tests.adapters import write_adapter
from tests.checkpoints import (
    edit_header,
    edit_json,
    message_of,
    tiny_checkpoint,
    tiny_config,
    tiny_tensors,
    to_dtype,
    write_safetensors,
    write_shards,
)
from tests.peer import need_peer, peer_lora

IDS = [1, 17, 93, 208, 44, 5]
SHAPES = {
    "model.embed_tokens": (320, 64),
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.1.self_attn.k_proj": (32, 64),
    "model.layers.0.self_attn.v_proj": (32, 64),
    "model.layers.1.mlp.down_proj": (64, 128),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "base", dtype="F32")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapter", SHAPES)
    return tmp_path / "adapter"


def merged_by_hand(base: Path, adapter: Path, folder: Path, **config: Any) -> Path:
    """The checkpoint that W + scale * B @ A makes."""
    shutil.rmtree(adapter)
    deltas = write_adapter(adapter, SHAPES, **config)
    tensors = tiny_tensors(tiny_config(), "F32")
    shutil.copytree(base, folder)
    write_shards(folder, {name: array + deltas.get(name, 0) for name, array in tensors.items()}, 2)
    return folder


def logits(checkpoint: Path, output: Path, **options: Any) -> np.ndarray[Any, Any]:
    convert_checkpoint(checkpoint, output, file_type("F32"), check=False, force=True, **options)
    return forward_pass(output, IDS, threads=1)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"lora_alpha": 7.5}], ids=str)
def test_the_same_folded_in_and_beside_the_model(
    base: Path, adapter: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    expected = logits(merged_by_hand(base, adapter, tmp_path / "merged", **config), tmp_path / "expected.gguf")
    np.testing.assert_allclose(logits(base, tmp_path / "folded.gguf", adapter=adapter), expected, atol=1e-4)
    plain, lora = tmp_path / "plain.gguf", tmp_path / "lora.gguf"
    assert np.abs(logits(base, plain) - expected).max() > 0.1
    assert main(["convert", str(adapter), "--base", str(base), "-o", str(lora)]) == 0
    np.testing.assert_allclose(forward_pass(plain, IDS, threads=1, adapter=lora), expected, atol=1e-4)


def test_alpha_of_one_module(base: Path, adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", lambda config: config.update(alpha_pattern={"0.self_attn.q_proj": 32}))
    deltas = open_adapter(adapter).deltas
    assert deltas["model.layers.0.self_attn.q_proj.weight"].scale == 8
    assert deltas["model.layers.0.self_attn.v_proj.weight"].scale == 4


def test_tensors_that_are_replaced_as_a_whole(base: Path, adapter: Path, tmp_path: Path) -> None:
    head = np.full((320, 64), 0.25, np.float32)
    path = adapter / "adapter_model.safetensors"
    write_safetensors(path, {"base_model.model.lm_head.weight": head, **part("model.layers.0.mlp.up_proj", 128, 64)})
    folded = tmp_path / "folded.gguf"
    assert main(["convert", str(adapter), "--base", str(base), "--merge", "-t", "F32", "-o", str(folded)]) == 0
    output = next(tensor for tensor in read_gguf(folded).tensors if tensor.name == "output.weight")
    assert (np.frombuffer(folded.read_bytes()[output.offset :], np.float32, 320 * 64) == 0.25).all()


def part(module: str, n_out: int, n_in: int, rank: int = 4) -> dict[str, Any]:
    return {
        f"base_model.model.{module}.lora_A.weight": np.zeros((rank, n_in), np.float32),
        f"base_model.model.{module}.lora_B.weight": np.zeros((n_out, rank), np.float32),
    }


def test_what_the_file_says(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "lora.gguf"
    command = ["convert", str(adapter), "--base", str(base), "-o", str(output), "-t", "f16", "--json"]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"path": str(output), "matrices": 5, "bytes": output.stat().st_size}
    file = read_gguf(output)
    assert {name: file.metadata[name] for name in ("general.type", "adapter.type", "adapter.lora.alpha")} == {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 16.0,
    }
    assert {tensor.type for tensor in file.tensors} == {"F16"}
    assert main(command) == 1  # it is there already
    assert "is already there" in capsys.readouterr().err


# What is refused


def config(**fields: Any) -> Callable[[Path], None]:
    return lambda adapter: edit_json(adapter / "adapter_config.json", lambda config: config.update(fields))


def weights(tensors: dict[str, Any]) -> Callable[[Path], None]:
    return lambda adapter: write_safetensors(adapter / "adapter_model.safetensors", tensors)


def other_dtype(dtype: str) -> Callable[[Path], None]:
    def change(header: dict[str, Any]) -> None:
        entry = next(entry for name, entry in header.items() if "lora_A" in name)
        entry["dtype"], entry["shape"] = dtype, [entry["shape"][0] * 4 // DTYPE_BYTES[dtype], entry["shape"][1]]

    return lambda adapter: edit_header(adapter / "adapter_model.safetensors", change)


BAD: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "dora": (config(use_dora=True), UnsupportedError, "'use_dora' is True"),
    "another kind": (config(peft_type="IA3"), UnsupportedError, "'peft_type' is IA3"),
    "no alpha": (config(lora_alpha=None), CheckpointError, "'lora_alpha' is missing, not a number"),
    "alpha a text": (config(lora_alpha="16"), CheckpointError, "not a number"),
    "patterns a list": (config(alpha_pattern=[1]), CheckpointError, "'alpha_pattern' is no object"),
    "no weights": (
        lambda adapter: (adapter / "adapter_model.safetensors").unlink(),
        CheckpointError,
        "has no adapter",
    ),
    "of integers": (other_dtype("I32"), UnsupportedError, "is I32; BF16, F16 and F32 are converted"),
    "empty": (weights({}), CheckpointError, "holds no LoRA matrices"),
    "half a pair": (
        weights(dict(list(part("model.layers.0.mlp.up_proj", 128, 64).items())[:1])),
        TensorError,
        "lacks one of the two matrices",
    ),
    "no rank in common": (
        weights({**part("m", 4, 4), "base_model.model.m.lora_A.weight": np.zeros((3, 4), np.float32)}),
        TensorError,
        "no rank in common",
    ),
    "a module of another model": (weights(part("model.layers.9.mlp.up_proj", 128, 64)), TensorError, "does not have"),
    "another shape": (weights(part("model.layers.0.mlp.up_proj", 64, 64)), TensorError, r"of \[64, 64\]"),
    "another tensor": (weights({"\x1b[2J": np.zeros(1, np.float32)}), UnsupportedError, "is no part of a plain LoRA"),
}


@pytest.mark.parametrize(("damage", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_adapters(
    base: Path,
    adapter: Path,
    tmp_path: Path,
    damage: Callable[[Path], Any],
    error: type[Exception],
    message: str,
) -> None:
    damage(adapter)
    output = tmp_path / "out.gguf"
    with pytest.raises(error, match=message) as raised:
        convert_checkpoint(base, output, file_type("F32"), adapter=adapter)
    assert str(raised.value).isprintable()
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{adapter}"], "is a LoRA adapter"),
        (["{base}", "--merge"], "is no LoRA adapter"),
        (["{base}", "--base", "{base}"], "is no LoRA adapter"),
        (["{adapter}", "--base", "{base}", "-t", "Q4_K_M"], "an adapter is F32, F16, BF16 or Q8_0"),
        (["{adapter}", "--base", "{adapter}"], "has no config.json"),
    ],
)
def test_what_does_not_go_together(
    base: Path, adapter: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *(text.format(base=base, adapter=adapter) for text in arguments)]) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_delta_that_only_a_merge_can_follow(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that scales a matrix scales what is added to it too, which numbers of rows show."""
    from dataclasses import replace

    from convert import adapter as module
    from models.families import ModelFamily, family_of
    from models.families.passes import change

    def doubled(name: str, config: Any) -> ModelFamily:
        family = family_of(name)
        twice = change(r".*\.down_proj\.weight", lambda weights, hparams: weights.mapped(lambda values: 2 * values))
        return replace(family, passes=(*family.passes, twice))

    monkeypatch.setattr(module, "family_of", doubled)
    said = message_of(lambda: module.convert_adapter(adapter, base, tmp_path / "lora.gguf", F32))
    assert "'model.layers.1.mlp.down_proj.weight', which an adapter beside the model cannot follow" in said


# Against llama.cpp's own


@pytest.mark.parity
def test_equals_the_converter_of_llama_cpp(base: Path, adapter: Path, tmp_path: Path) -> None:
    need_peer()
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    assert main(["convert", str(adapter), "--base", str(base), "-o", str(ours), "-q"]) == 0
    peer_lora(adapter, base, theirs)
    assert contents(ours) == contents(theirs)


@pytest.mark.parity
def test_an_adapter_that_torch_saved(base: Path, adapter: Path, tmp_path: Path) -> None:
    import torch

    expected = logits(base, tmp_path / "folded.gguf", adapter=adapter)
    path = adapter / "adapter_model.safetensors"
    tensors = {info.name: torch.from_numpy(stored(info).values()) for info in read_header(path)}
    path.unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    np.testing.assert_array_equal(logits(base, tmp_path / "again.gguf", adapter=adapter), expected)


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    file, data = read_gguf(path), path.read_bytes()
    keys = {key: value for key, value in file.metadata.items() if key not in ("general.name", "general.version")}
    return keys, {t.name: (t.type, t.shape, data[t.offset : t.offset + t.nbytes]) for t in file.tensors}


def test_a_bf16_base_takes_what_is_added(tmp_path: Path, adapter: Path) -> None:
    """The sum is rounded once, to the type of the checkpoint's matrices."""
    base = tiny_checkpoint(tmp_path / "base")
    deltas = write_adapter(tmp_path / "again", SHAPES)
    output = tmp_path / "out.gguf"
    convert_checkpoint(base, output, file_type("BF16"), adapter=adapter, check=False)
    name = "model.layers.1.mlp.down_proj.weight"
    stored = tiny_tensors(tiny_config())[name].astype(np.uint32) << 16
    expected = to_dtype(stored.view(np.float32) + deltas[name], "BF16")
    tensor = next(tensor for tensor in read_gguf(output).tensors if tensor.name == "blk.1.ffn_down.weight")
    written = np.frombuffer(output.read_bytes()[tensor.offset :], np.uint16, 64 * 128).reshape(64, 128)
    assert (written == expected).mean() > 0.999  # the order of a sum of four may differ in the last bit


def test_handmill_convert_names_what_is_missing(tmp_path: Path, adapter: Path) -> None:
    command = [sys.executable, "-m", "runner.cli.main", "convert", str(adapter)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--base CHECKPOINT" in done.stderr
    assert "Traceback" not in done.stderr
