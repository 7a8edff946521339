"""A GGUF file as the source: what stays, what changes, what is refused. Its bytes: test_parity_gguf_source.py."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from convert.converter import convert_checkpoint
from convert.file_types import file_type
from convert.gguf_source import convert_gguf, plan_gguf
from models.errors import CheckFailed, HandmillError, ModelFileError, OutputError, TensorError, UnsupportedError
from models.gguf_file import raw_metadata, read_gguf
from models.native import forward_pass
from runner.cli.main import main
from tests.checkpoints import message_of, tiny_checkpoint

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`f16.gguf` and `q8_0.gguf` of one tiny checkpoint of f16 weights."""
    folder = tmp_path_factory.mktemp("sources")
    checkpoint = tiny_checkpoint(folder / "tiny", dtype="F16", **SIZES)
    for name in ("f16", "q8_0", "q4_k_m"):
        convert_checkpoint(checkpoint, folder / f"{name}.gguf", file_type(name), check=False)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def bent(source: Path, folder: Path, old: bytes, new: bytes) -> Path:
    data = source.read_bytes()
    assert data.count(old) >= 1
    path = folder / "bent.gguf"
    path.write_bytes(data.replace(old, new, 1))
    return path


def refused(source: Path, folder: Path) -> HandmillError:
    """What is said of a source from which nothing must come."""
    (folder / "out").mkdir()
    with pytest.raises(HandmillError) as raised:
        convert_gguf(source, folder / "out" / "out.gguf", file_type("Q4_0"))
    assert str(raised.value).isprintable()
    assert files(folder / "out") == []
    return raised.value


def test_the_same_file_as_from_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    for name in ("F16", "Q4_K_M"):
        report = convert_gguf(folder / "f16.gguf", tmp_path / "out.gguf", file_type(name), force=True)
        assert (report.checked, report.plan.n_bytes) == (True, report.path.stat().st_size)
        assert report.path.read_bytes() == (folder / f"{name.lower()}.gguf").read_bytes()


def test_metadata_that_nobody_knows_is_kept(tmp_path: Path) -> None:
    source, output = tmp_path / "in.gguf", tmp_path / "out.gguf"
    convert_checkpoint(tiny_checkpoint(tmp_path / "tiny"), tmp_path / "plain.gguf", file_type("F32"), check=False)
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    writer = gguf.GGUFWriter(source, "llama")
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            array = entry.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(key, entry.contents(), entry.types[0], entry.types[-1] if array else None)
    writer.add_key_value("x.i64", -(2**60), gguf.GGUFValueType.INT64)
    writer.add_key_value("x.f64", 1e300, gguf.GGUFValueType.FLOAT64)
    writer.add_key_value("x.bytes", [1, 2, 255], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8)
    writer.add_custom_alignment(64)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert_gguf(source, output, file_type("Q8_0"))
    before, after = raw_metadata(source), raw_metadata(output)
    own = {"general.file_type", "general.quantization_version"}
    assert list(after)[-2:] == ["general.quantization_version", "general.file_type"]
    # llama-quantize keeps the key and pads to 32 all the same, so that its file does not load
    assert {k: v for k, v in after.items() if k not in own} == {
        k: v for k, v in before.items() if k not in {*own, "general.alignment"}
    }
    assert read_gguf(output).file_type == "Q8_0"


def test_what_is_quantized_is_refused_unless_asked_for(folder: Path, tmp_path: Path) -> None:
    error = refused(folder / "q8_0.gguf", tmp_path)
    assert isinstance(error, UnsupportedError)
    assert "is Q8_0, and would become Q" in str(error)
    assert "--requantize" in error.hint
    output = tmp_path / "out.gguf"
    convert_gguf(folder / "q8_0.gguf", output, file_type("F16"), requantize=True)
    a, b = (forward_pass(path, [1, 5, 9], threads=1) for path in (output, folder / "q8_0.gguf"))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


def test_what_keeps_its_type_is_copied(folder: Path, tmp_path: Path) -> None:
    """Encoding it again would change it."""
    report = convert_gguf(folder / "q4_k_m.gguf", tmp_path / "out.gguf", file_type("Q4_K_M"))
    assert report.path.read_bytes() == (folder / "q4_k_m.gguf").read_bytes()


def test_a_source_in_parts(folder: Path, tmp_path: Path) -> None:
    split = convert_gguf(folder / "f16.gguf", tmp_path / "in.gguf", file_type("F16"), split_size=500_000)
    assert len(split.paths) > 2
    whole = convert_gguf(split.path, tmp_path / "out.gguf", file_type("Q4_K_M"))
    assert whole.path.read_bytes() == (folder / "q4_k_m.gguf").read_bytes()
    split.paths[-1].unlink()
    assert f"{split.paths[-1].name} does not exist" in str(refused(split.path, tmp_path))


def test_the_plan_is_the_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(folder / "f16.gguf")
    assert main(["convert", source, "-t", "Q4_0", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(["convert", source, "-t", "Q4_0", "-o", str(tmp_path / "out.gguf"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert plan["bytes"] == report["bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert plan["types"] == report["types"]
    assert report["parts"] == 1


def test_it_goes_to_the_library_under_the_name_of_the_model(folder: Path, tmp_path: Path, own_home: Path) -> None:
    source = tmp_path / "Tiny-1B-F16.gguf"
    source.symlink_to(folder / "f16.gguf")
    assert main(["convert", str(source), "-t", "Q4_0", "-q"]) == 0
    assert [path.name for path in own_home.rglob("*.gguf")] == ["Tiny-1B-Q4_0.gguf"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--base", "x"], "--base is for checkpoints"),
        (["--merge"], "--merge is for checkpoints"),
        (["--ignore-field", "x"], "--ignore-field is for checkpoints"),
    ],
)
def test_options_of_checkpoints(args: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(folder / "f16.gguf"), *args]) == 2
    assert says in capsys.readouterr().err
    assert main(["convert", str(folder / "tiny"), "--requantize"]) == 2
    assert "--requantize is for" in capsys.readouterr().err


# Sources that cannot be


def test_no_such_file_and_no_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shard.safetensors").write_bytes(struct.pack("<Q", 20) + b'{"__metadata__":{}}  ')
    for name, says in (("none.gguf", "does not exist"), ("shard.safetensors", "it is a safetensors file")):
        assert main(["convert", str(tmp_path / name), "-o", str(tmp_path / "out.gguf")]) == 1
        assert says in capsys.readouterr().err
    assert files(tmp_path) == ["shard.safetensors"]


def test_cut_short(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes((folder / "f16.gguf").read_bytes()[:-1000])
    error = refused(path, tmp_path)
    assert isinstance(error, ModelFileError)
    assert "cut short" in str(error)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        (b"llama.block_count", struct.pack("<I", 0), "block_count is 0"),
        (b"llama.block_count", struct.pack("<I", 1000), "block_count is 1000"),
        (b"llama.block_count", struct.pack("<I", 3), "lacks a tensor of the model: blk.2."),
        (b"llama.block_count", struct.pack("<I", 1), "does not read blk.1."),
        (b"llama.attention.layer_norm_rms_epsilon", struct.pack("<f", np.nan), "epsilon is nan"),
        (b"llama.attention.layer_norm_rms_epsilon", struct.pack("<f", -1), "epsilon is -1.0"),
        (b"llama.feed_forward_length", struct.pack("<I", 64), "does not have the shape that the model's config"),
    ],
)
def test_metadata_that_would_end_the_process_or_lie(
    key: bytes, value: bytes, says: str, folder: Path, tmp_path: Path
) -> None:
    raw = raw_metadata(folder / "f16.gguf")[key.decode()]
    assert says in str(refused(bent(folder / "f16.gguf", tmp_path, raw, raw[:-4] + value), tmp_path))


@pytest.mark.parametrize("name", [b"blk.0.attn q.weight", b"blk.0.attn\nq.weight", b"blk.0.attn\x1bq.weight"])
def test_a_name_that_would_forge_a_line_of_the_log(name: bytes, folder: Path, tmp_path: Path) -> None:
    error = refused(bent(folder / "f16.gguf", tmp_path, b"blk.0.attn_q.weight", name), tmp_path)
    assert isinstance(error, TensorError)
    assert "is of no model" in str(error)


def test_an_unknown_architecture(folder: Path, tmp_path: Path) -> None:
    path = bent(folder / "f16.gguf", tmp_path, struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"nomad")
    assert "unknown model architecture: 'nomad'" in str(refused(path, tmp_path))


@pytest.mark.parametrize("held", ["f16", "q4_k_m"])
def test_nan_names_the_tensor(held: str, folder: Path, tmp_path: Path) -> None:
    """Among what is encoded, and among what is copied."""
    source = read_gguf(folder / f"{held}.gguf")
    name = "blk.0.attn_q.weight" if held == "f16" else "output_norm.weight"
    [tensor] = [t for t in source.tensors if t.name == name]
    data = bytearray(source.path.read_bytes())
    data[tensor.offset : tensor.offset + 4] = b"\xff\x7f\xff\x7f"
    path = tmp_path / "nan.gguf"
    path.write_bytes(data)
    (tmp_path / "out").mkdir()
    with pytest.raises(TensorError, match=f"'{name}' in nan.gguf: it holds NaN"):
        convert_gguf(path, tmp_path / "out" / "out.gguf", file_type("Q4_K_M"))
    assert files(tmp_path / "out") == []


def test_random_flips_in_the_header_give_nothing_but_named_errors(folder: Path, tmp_path: Path) -> None:
    data = (folder / "f16.gguf").read_bytes()
    n_header = min(tensor.offset for tensor in read_gguf(folder / "f16.gguf").tensors)
    random = np.random.default_rng(0)
    path, failed = tmp_path / "bent.gguf", 0
    for _ in range(40):
        flipped = bytearray(data)
        for place in random.integers(0, n_header, 3):
            flipped[place] = random.integers(256)
        path.write_bytes(flipped)
        said = message_of(lambda: plan_gguf(path, file_type("Q8_0")))
        failed += bool(said)
        assert said.isprintable()
    assert failed > 10


def test_logits_that_are_not_finite_fail_the_check(folder: Path, tmp_path: Path) -> None:
    source = read_gguf(folder / "f16.gguf")
    [norm] = [t for t in source.tensors if t.name == "output_norm.weight"]
    data = bytearray(source.path.read_bytes())
    data[norm.offset : norm.offset + norm.nbytes] = np.full(norm.weights, 3e38, np.float32).tobytes()
    (tmp_path / "wild.gguf").write_bytes(data)
    with pytest.raises(CheckFailed, match="NaN or infinite logits"):
        convert_gguf(tmp_path / "wild.gguf", tmp_path / "out.gguf", file_type("F16"))
    assert files(tmp_path) == ["wild.gguf"]


def test_an_existing_file_is_kept_and_the_source_may_be_replaced(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes((folder / "f16.gguf").read_bytes())
    with pytest.raises(OutputError, match="already there"):
        convert_gguf(path, path, file_type("Q4_K_M"))
    convert_gguf(path, path, file_type("Q4_K_M"), force=True)
    assert path.read_bytes() == (folder / "q4_k_m.gguf").read_bytes()
