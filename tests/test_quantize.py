"""Types and bytes against libllama itself: every file type, its figures, and what does not fit."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import quantize
from convert.converter import convert_checkpoint, plan_conversion
from convert.file_types import FILE_TYPES, FileType, file_type
from convert.gguf_writer import TensorEntry, header_bytes, padded
from convert.metadata import build_metadata
from models.errors import CheckpointError, ConversionFailed, TensorError, UnsupportedError, UsageError
from models.gguf_types import FILE_TYPES as GGUF_FILE_TYPES
from models.native import capture_log, library
from tests.checkpoints import Dtype, Tensors, edit_json, tiny_checkpoint, tiny_config, tiny_tensors, write_shards

MAKEABLE = [kind.name for kind in FILE_TYPES.values() if not kind.needs_matrix]
REFUSED = [kind.name for kind in FILE_TYPES.values() if kind.needs_matrix]

# Rows that K types take, rows that only 32 divides, and rows that nothing divides.
SHAPES: dict[str, dict[str, Any]] = {
    "256": {"hidden_size": 256, "intermediate_size": 256},
    "224": {"hidden_size": 224, "intermediate_size": 608, "num_attention_heads": 7, "num_key_value_heads": 1},
    "72": {"hidden_size": 72, "intermediate_size": 136, "num_attention_heads": 2, "num_key_value_heads": 1},
}
OTHERS = (("72", "BF16"), ("256", "F16"), ("224", "F16"), ("256", "F32"))
# llama.cpp has no type to fall back on for such rows
NOT_IN_LLAMA_CPP = {("224", "Q1_0"), ("224", "Q2_0")}


def llama_quantize(source: Path, output: Path, kind: FileType) -> bool:
    """llama.cpp's second step, by the function that llama-quantize calls; False if it refuses."""
    lib = library()
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = kind.id, 2
    with capture_log():
        return bool(lib.llama_model_quantize(os.fsencode(source), os.fsencode(output), ctypes.byref(params)) == 0)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Dtype], tuple[Path, Path]]:
    """By row length and dtype: a checkpoint, and the file of its own type that llama.cpp quantizes from."""

    @cache
    def make(rows: str, dtype: Dtype) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("step")
        checkpoint = tiny_checkpoint(folder / "tiny", dtype=dtype, num_hidden_layers=1, **SHAPES[rows])
        convert_checkpoint(checkpoint, folder / "step.gguf", file_type(dtype))
        return checkpoint, folder / "step.gguf"

    return make


@pytest.mark.parametrize(
    ("rows", "dtype", "name"),
    [
        *((rows, "BF16", name) for rows in ("256", "224") for name in MAKEABLE),
        *((rows, dtype, name) for rows, dtype in OTHERS for name in ("Q4_K_M", "Q8_0", "Q5_1", "F16", "F32")),
    ],
)
def test_one_pass_equals_two_steps(
    steps: Callable[[str, Dtype], tuple[Path, Path]], rows: str, dtype: Dtype, name: str, tmp_path: Path
) -> None:
    checkpoint, step = steps(rows, dtype)
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    if not llama_quantize(step, theirs, file_type(name)):
        assert (rows, name) in NOT_IN_LLAMA_CPP
        with pytest.raises(ConversionFailed, match=f"llama.cpp cannot quantize this model to {name}: .*fallback"):
            convert_checkpoint(checkpoint, ours, file_type(name), check=False)
        return
    convert_checkpoint(checkpoint, ours, file_type(name), check=False)
    assert ours.read_bytes() == theirs.read_bytes()


def test_mixed_dtypes_pass_through_that_of_the_first_matrix(tmp_path: Path) -> None:
    """As llama.cpp's converter stores them: F32 and F16 matrices beside BF16 ones are rounded to BF16."""
    config = tiny_config()
    tensors: Tensors = {}
    for i, (name, values) in enumerate(tiny_tensors(config, "F32").items()):
        kinds = (tiny_tensors(config, "BF16")[name], values.astype(np.float16), values)
        tensors[name] = kinds[i % 3]
    assert {array.dtype for array in tensors.values()} == {np.dtype(t) for t in (np.uint16, np.float16, np.float32)}
    checkpoint = tiny_checkpoint(tmp_path / "tiny", shards=1)
    write_shards(checkpoint, tensors, 1)
    for name in ("BF16", "Q8_0"):
        convert_checkpoint(checkpoint, tmp_path / f"{name}.gguf", file_type(name))
    assert llama_quantize(tmp_path / "BF16.gguf", tmp_path / "theirs.gguf", file_type("Q8_0"))
    assert (tmp_path / "Q8_0.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


# File types


def test_file_types_are_those_of_llama_cpp() -> None:
    assert {kind.id: kind.name for kind in FILE_TYPES.values()}.items() <= GGUF_FILE_TYPES.items()
    # NVFP4 files are made by other tools only
    assert set(GGUF_FILE_TYPES.values()) - set(FILE_TYPES) == {"NVFP4"}


@pytest.mark.parametrize(
    ("given", "found"),
    [("q4_k_m", "Q4_K_M"), ("Q4_K", "Q4_K_M"), ("q3-k-s", "Q3_K_S"), ("bf16", "BF16"), ("MXFP4", "MXFP4_MOE")],
)
def test_names_in_any_case(given: str, found: str) -> None:
    assert file_type(given).name == found


@pytest.mark.parametrize("name", ["", "Q4", "Q4_K_XL", "\x1b[2J", "q" * 1000])
def test_unknown_names_list_those_that_can_be_made(name: str) -> None:
    with pytest.raises(UsageError) as raised:
        file_type(name)
    assert str(raised.value).isprintable()
    assert all(known in raised.value.hint for known in MAKEABLE)
    assert not any(known in raised.value.hint.split(", ") for known in REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_types_that_need_a_matrix_are_refused_by_name(name: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", **SHAPES["256"])
    with pytest.raises(UnsupportedError, match=f"{name} needs an importance matrix") as raised:
        convert_checkpoint(checkpoint, tmp_path / "out.gguf", file_type(name))
    assert "handmill convert --type list" in raised.value.hint
    assert not (tmp_path / "out.gguf").exists()


@pytest.fixture(scope="module")
def llama_3_8b(tmp_path_factory: pytest.TempPathFactory) -> Callable[[FileType], float]:
    """Bits per weight of a Llama 3 8B by llama.cpp's own plan; it raises what `choose_tensor_types` raises."""
    from convert.checkpoint import open_checkpoint
    from models.families import family_of
    from models.hparams import Hparams

    folder = tmp_path_factory.mktemp("llama") / "llama"
    tiny_checkpoint(folder)
    sizes: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    checkpoint = open_checkpoint(folder)
    config = tiny_config(**sizes)
    hparams, family = Hparams(config, {}), family_of("LlamaForCausalLM")
    block = {
        "attn_norm": (4096,),
        "attn_q": (4096, 4096),
        "attn_k": (4096, 1024),
        "attn_v": (4096, 1024),
        "attn_output": (4096, 4096),
        "ffn_norm": (4096,),
        "ffn_gate": (4096, 14336),
        "ffn_up": (4096, 14336),
        "ffn_down": (14336, 4096),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (4096, 128256),
        "output_norm": (4096,),
        "output": (4096, 128256),
    }
    for i in range(32):
        shapes |= {f"blk.{i}.{part}": shape for part, shape in block.items()}
    weights = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    entries = [
        TensorEntry(f"{name}.weight", shape, *((0, 4 * weights[name]) if len(shape) == 1 else (30, 2 * weights[name])))
        for name, shape in shapes.items()
    ]
    metadata = build_metadata(checkpoint, family, hparams, shapes={}, file_type=0, vocabulary=None)
    header = header_bytes(metadata, entries)

    def bits(kind: FileType) -> float:
        with quantize.hollow_file(header, sum(padded(entry.nbytes) for entry in entries)) as hollow:
            types = quantize.choose_tensor_types(hollow, kind, len(entries))
        n_bytes = sum(
            weights[name] // types[f"{name}.weight"].block * types[f"{name}.weight"].nbytes for name in shapes
        )
        return n_bytes * 8 / sum(weights.values())

    return bits


@pytest.mark.parametrize("name", MAKEABLE)
def test_bits_per_weight_are_those_of_llama_3_8b(llama_3_8b: Callable[[FileType], float], name: str) -> None:
    assert llama_3_8b(file_type(name)) == pytest.approx(file_type(name).bits_per_weight, abs=0.006)


@pytest.mark.parametrize("name", REFUSED)
def test_llama_3_8b_needs_a_matrix_for_these(llama_3_8b: Callable[[FileType], float], name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} needs an importance matrix"):
        llama_3_8b(file_type(name))


# The structure, by llama.cpp


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, r"lacks a tensor of the model: blk\.1\.ffn_up\.weight"),
        ("model.norm.weight", None, r"lacks a tensor of the model: output_norm\.weight"),
        ("model.norm.bias", (64,), r"'model\.norm\.bias' has no place in this model"),
        ("model.layers.0.mlp.router.weight", (4, 64), r"'model\.layers\.0\.mlp\.router\.weight' has no place in this"),
        (
            "model.layers.0.mlp.up_proj.weight",
            (64, 128),
            r"up_proj\.weight' does not have the shape .* it is \[128, 64, 1, 1\], the config makes it \[64, 128\]",
        ),
        ("lm_head.weight", (319, 64), r"'lm_head\.weight' does not have the shape"),
        ("lm_head.weight", (320, 64, 1), r"'lm_head\.weight' does not have the shape"),
        ("model.embed_tokens.weight", (320,), r"'model\.embed_tokens\.weight' does not have the shape"),
    ],
)
def test_tensors_at_odds_with_the_config(
    name: str, shape: tuple[int, ...] | None, message: str, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    tensors = tiny_tensors(tiny_config())
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = np.zeros(shape, np.uint16)
    write_shards(checkpoint, tensors, 2)
    with pytest.raises(TensorError, match=message):
        plan_conversion(checkpoint)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 3},
        {"intermediate_size": 129},
        {"num_key_value_heads": 4},
        {"num_attention_heads": 3, "head_dim": 16},
        {"num_key_value_heads": 3},
        {"num_attention_heads": 2**30},
        {"num_attention_heads": 1, "head_dim": 2**30},
        {"num_hidden_layers": 2**30},
        {"hidden_size": 2**30, "head_dim": 16},
        {"max_position_embeddings": 2**31 - 1, "hidden_size": 2**31 - 64},
    ],
    ids=str,
)
def test_config_of_another_model(fields: dict[str, int], tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    edit_json(checkpoint / "config.json", lambda config: config.update(fields))
    with pytest.raises(CheckpointError) as raised:
        plan_conversion(checkpoint)
    assert str(raised.value).isprintable()


# Rows


def test_slabs_give_the_bytes_of_the_whole() -> None:
    values = np.random.default_rng(0).standard_normal((12, 512), dtype=np.float32)
    for name in ("Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "F16", "BF16", "F32"):
        kind = quantize.tensor_type(name)
        quantize.prepare_encoder([kind])
        whole = quantize.encode_rows(values, kind)
        parts = [quantize.encode_rows(values[i : i + 5], kind) for i in range(0, 12, 5)]
        assert np.concatenate(parts).tobytes() == whole.tobytes()
        assert whole.nbytes == 12 * kind.row_bytes(512)


def test_decoding_undoes_the_encoding_of_the_float_types() -> None:
    values = np.array([[0.0, -0.0, 1.5, -2.0, 65504.0, 2.0**-14, 2.0**-24, 1 / 1024]], np.float32)
    for name in ("F16", "BF16", "F32"):
        kind = quantize.tensor_type(name)
        raw = quantize.encode_rows(values, kind).view(np.uint32 if name == "F32" else np.uint16).reshape(values.shape)
        expected = quantize.rounded_to(values, kind)
        assert quantize.decode_rows(raw, name).tobytes() == expected.tobytes()
    assert quantize.rounded_to(values, quantize.F16).tobytes() == values.tobytes()


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_K", "Q4_0", "IQ4_NL"])
def test_values_beyond_a_type_are_refused(name: str) -> None:
    kind = quantize.tensor_type(name)
    quantize.prepare_encoder([kind])
    values = np.full((1, 256), 1e30, np.float32)
    with pytest.raises(ConversionFailed, match=f"its values do not fit {name}"):
        quantize.encode_rows(values, kind)
