"""Quantized checkpoints: each method packed here by its published layout, and decoded to the values it stands for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from convert.checkpoint import open_checkpoint
from convert.converter import convert_checkpoint, plan_conversion
from convert.file_types import file_type
from convert.quantized import decoded
from convert.quantized.fp8 import _TABLES
from models.errors import UnsupportedError
from models.gguf_file import read_gguf
from models.weights import Weights
from tests.checkpoints import (
    edit_json,
    message_of,
    quick,
    tiny_config,
    tiny_tensors,
    to_dtype,
    write_json,
    write_tiny_tokenizer,
)
from tests.family_checkpoints import VOCABULARY, write_tokenizer
from tests.peer import need_peer, peer_convert

Array = NDArray[Any]
RANDOM = np.random.default_rng(5)
N_OUT, N_IN = 64, 128

DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "uint8": "U8",
    "int8": "I8",
    "int32": "I32",
    "int64": "I64",
}


def write_typed(path: Path, tensors: Mapping[str, tuple[str, Array]]) -> None:
    """A safetensors file of arrays with the names of their dtypes."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    encoded = json.dumps(header).encode()
    data = b"".join(array.tobytes() for _, array in tensors.values())
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def typed(array: Array, dtype: str = "") -> tuple[str, Array]:
    return dtype or DTYPES[array.dtype.name], np.ascontiguousarray(array)


Parts = dict[str, tuple[str, Array]]
Packer = Callable[[str], tuple[Parts, Array]]
"""The name of a matrix to its stored parts, and what they stand for: [N_OUT, N_IN]."""


def fp8(scale_name: str, scale_shape: tuple[int, ...], block: tuple[int, int] | None = None) -> Packer:
    def pack(name: str) -> tuple[Parts, Array]:
        codes = RANDOM.integers(0, 0x7F, (N_OUT, N_IN), dtype=np.uint8) | (
            RANDOM.integers(0, 2, (N_OUT, N_IN), dtype=np.uint8) << 7
        )
        scale = RANDOM.uniform(0.01, 0.02, scale_shape).astype(np.float32)
        spread = scale if block is None else np.repeat(np.repeat(scale, block[0], 0), block[1], 1)[:N_OUT, :N_IN]
        if block is None and len(scale_shape) == 1 and scale_shape[0] == N_OUT:
            spread = scale[:, None]
        values = e4m3(codes) * spread
        return {f"{name}.weight": typed(codes, "F8_E4M3"), f"{name}.weight{scale_name}": typed(scale)}, values

    return pack


def e4m3(codes: Array) -> Array:
    """By the definition: sign, four bits of exponent with bias 7, three of mantissa."""
    sign = np.where(codes >> 7, -1.0, 1.0)
    exponent, mantissa = (codes >> 3 & 15).astype(int), (codes & 7) / 8
    return (sign * np.where(exponent, (1 + mantissa) * 2.0 ** (exponent - 7), mantissa * 2.0**-6)).astype(np.float32)


def words(values: Array, bits: int, axis: int) -> Array:
    """Small integers into 32-bit words along an axis, the first into the lowest bits."""
    per_word = 32 // bits
    moved = np.moveaxis(values.astype(np.uint64), axis, -1)
    pad = -moved.shape[-1] % per_word
    moved = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, pad)]).reshape(*moved.shape[:-1], -1, per_word)
    packed = sum(moved[..., i] << np.uint64(bits * i) for i in range(per_word))
    return np.moveaxis(np.asarray(packed).astype(np.uint32).view(np.int32), -1, axis)


def gptq(bits: int = 4, group: int = 32, order: bool = False, less_one: int = 1) -> Packer:
    def pack(name: str) -> tuple[Parts, Array]:
        n_groups = N_IN // group
        codes = RANDOM.integers(0, 1 << bits, (N_IN, N_OUT))
        zeros = RANDOM.integers(less_one, 1 << bits, (n_groups, N_OUT))
        scales = RANDOM.uniform(0.01, 0.02, (n_groups, N_OUT)).astype(np.float16)
        groups = np.arange(N_IN) // group
        if order:
            RANDOM.shuffle(groups)
        values = scales[groups].astype(np.float32) * (codes - zeros[groups]).astype(np.float32)
        return {
            f"{name}.qweight": typed(words(codes, bits, 0)),
            f"{name}.qzeros": typed(words(zeros - less_one, bits, 1)),
            f"{name}.scales": typed(scales),
            f"{name}.g_idx": typed(groups.astype(np.int32)),
        }, values.T

    return pack


def awq(group: int = 32) -> Packer:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(values: Array) -> Array:
        eights = values.reshape(len(values), -1, 8)
        return words(eights[:, :, order].reshape(len(values), -1), 4, 1)

    def pack(name: str) -> tuple[Parts, Array]:
        codes = RANDOM.integers(0, 16, (N_IN, N_OUT))
        zeros = RANDOM.integers(0, 16, (N_IN // group, N_OUT))
        scales = RANDOM.uniform(0.01, 0.02, (N_IN // group, N_OUT)).astype(np.float16)
        spread = np.repeat(scales.astype(np.float32), group, 0)
        values = (codes - np.repeat(zeros, group, 0)).astype(np.float32) * spread
        return {
            f"{name}.qweight": typed(packed(codes)),
            f"{name}.qzeros": typed(packed(zeros)),
            f"{name}.scales": typed(scales),
        }, values.T

    return pack


def compressed(bits: int = 4, group: int = 32, points: bool = False, order: bool = False) -> Packer:
    def pack(name: str) -> tuple[Parts, Array]:
        codes = RANDOM.integers(0, 1 << bits, (N_OUT, N_IN))
        scale = RANDOM.uniform(0.01, 0.02, (N_OUT, N_IN // group)).astype(np.float16)
        zeros = np.full(scale.shape, 1 << (bits - 1))
        if points:
            zeros = RANDOM.integers(0, 1 << bits, scale.shape)
        groups = np.arange(N_IN) // group
        if order:
            RANDOM.shuffle(groups)
        values = (codes - zeros[:, groups]).astype(np.float32) * scale[:, groups].astype(np.float32)
        parts = {
            f"{name}.weight_packed": typed(words(codes, bits, 1)),
            f"{name}.weight_scale": typed(scale),
            f"{name}.weight_shape": typed(np.array([N_OUT, N_IN])),
        }
        if points:
            parts[f"{name}.weight_zero_point"] = typed(words(zeros, bits, 0))
        if order:
            parts[f"{name}.weight_g_idx"] = typed(groups.astype(np.int32))
        return parts, values

    return pack


def int8(name: str) -> tuple[Parts, Array]:
    codes = RANDOM.integers(-128, 128, (N_OUT, N_IN)).astype(np.int8)
    scale = RANDOM.uniform(0.01, 0.02, (N_OUT, 1)).astype(np.float32)
    return {f"{name}.weight": typed(codes), f"{name}.weight_scale": typed(scale)}, codes.astype(np.float32) * scale


def llm_int8(name: str) -> tuple[Parts, Array]:
    codes = RANDOM.integers(-127, 128, (N_OUT, N_IN)).astype(np.int8)
    scale = RANDOM.uniform(1, 2, N_OUT).astype(np.float32)
    parts = {f"{name}.weight": typed(codes), f"{name}.SCB": typed(scale)}
    parts[f"{name}.weight_format"] = typed(np.zeros(1, np.uint8))
    return parts, codes.astype(np.float32) * (scale / np.float32(127))[:, None]


def nf4(nested: bool) -> Packer:
    def pack(name: str) -> tuple[Parts, Array]:
        table = np.sort(RANDOM.uniform(-1, 1, 16)).astype(np.float32)
        codes = RANDOM.integers(0, 16, N_OUT * N_IN).astype(np.uint8)
        n_blocks = codes.size // 64
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [N_OUT, N_IN]}
        parts = {
            f"{name}.weight": typed((codes[::2] << 4 | codes[1::2])[:, None]),
            f"{name}.weight.quant_map": typed(table),
        }
        if nested:
            inner = RANDOM.integers(0, 256, n_blocks).astype(np.uint8)
            inner_table = np.linspace(-1, 1, 256, dtype=np.float32)
            outer = RANDOM.uniform(0.01, 0.02, -(-n_blocks // 32)).astype(np.float32)
            state |= {"nested_blocksize": 32, "nested_dtype": "float32", "nested_offset": 0.05}
            absmax = inner_table[inner] * np.repeat(outer, 32)[:n_blocks] + np.float32(0.05)
            parts |= {
                f"{name}.weight.absmax": typed(inner),
                f"{name}.weight.nested_absmax": typed(outer),
                f"{name}.weight.nested_quant_map": typed(inner_table),
            }
        else:
            absmax = RANDOM.uniform(0.01, 0.2, n_blocks).astype(np.float32)
            parts[f"{name}.weight.absmax"] = typed(absmax)
        blob = np.frombuffer(json.dumps(state).encode(), np.uint8)
        parts[f"{name}.weight.quant_state.bitsandbytes__nf4"] = typed(blob)
        return parts, (table[codes] * np.repeat(absmax, 64)).reshape(N_OUT, N_IN)

    return pack


def scheme(form: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


METHODS: dict[str, tuple[dict[str, Any], Packer]] = {
    "fp8": ({"quant_method": "fp8"}, fp8("_scale_inv", ())),
    "fp8 rows": ({"quant_method": "fbgemm_fp8"}, fp8("_scale", (N_OUT, 1))),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [32, 48]}, fp8("_scale_inv", (2, 3), (32, 48))),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8("_scale", (1,))),
    "compressed fp8": (
        scheme("float-quantized", num_bits=8, type="float", strategy="channel"),
        fp8("_scale", (N_OUT, 1)),
    ),
    "compressed int8": (scheme("int-quantized", num_bits=8, strategy="channel"), int8),
    "compressed int4": (scheme("pack-quantized", num_bits=4, group_size=32, strategy="group"), compressed()),
    "compressed int4 points": (
        scheme("pack-quantized", num_bits=4, group_size=32, strategy="group"),
        compressed(points=True),
    ),
    "compressed int4 order": (
        scheme("pack-quantized", num_bits=4, group_size=32, strategy="group"),
        compressed(order=True),
    ),
    "compressed packed int8": (
        scheme("pack-quantized", num_bits=8, group_size=64, strategy="group"),
        compressed(8, 64),
    ),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, gptq()),
    "gptq order": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, gptq(order=True)),
    "gptq 2 bits": ({"quant_method": "gptq", "bits": 2, "group_size": 32}, gptq(2)),
    "gptq 8 bits": ({"quant_method": "gptq", "bits": 8, "group_size": 64}, gptq(8, 64)),
    "gptq v2": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
        gptq(less_one=0),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq()),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, nf4(False)),
    "nf4 nested": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, nf4(True)),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, llm_int8),
}


def decode(folder: Path, parts: Parts, settings: Mapping[str, Any]) -> dict[str, Weights]:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], "quantization_config": settings})
    write_typed(folder / "model.safetensors", parts)
    checkpoint = open_checkpoint(folder)
    return dict(decoded(checkpoint.tensors, checkpoint.config))


@pytest.mark.parametrize("method", METHODS)
def test_values_are_those_that_the_layout_stands_for(method: str, tmp_path: Path) -> None:
    settings, pack = METHODS[method]
    parts, expected = pack("m")
    plain = RANDOM.standard_normal((4, 8)).astype(np.float32)
    found = decode(tmp_path / "c", {**parts, "norm.weight": typed(plain)}, settings)
    assert found.keys() == {"m.weight", "norm.weight"}
    np.testing.assert_array_equal(found["norm.weight"].values(), plain)
    np.testing.assert_array_equal(found["m.weight"].values(), expected.astype(np.float32))


@pytest.mark.parametrize("method", METHODS)
@quick
@given(data=st.data())
def test_any_rows_and_columns_can_be_read(method: str, data: Any, tmp_path: Path) -> None:
    settings, pack = METHODS[method]
    parts, expected = pack("m")
    weights = decode(tmp_path / "c", parts, settings)["m.weight"]
    rows = data.draw(st.lists(st.integers(0, N_OUT - 1), min_size=1, max_size=6))
    start = data.draw(st.integers(0, N_IN - 1))
    stop = data.draw(st.integers(start + 1, N_IN))
    read = weights.read(np.array(rows), slice(start, stop))
    np.testing.assert_array_equal(read, expected.astype(np.float32)[rows, start:stop])


def test_every_code_of_fp8() -> None:
    codes = np.arange(256, dtype=np.uint8)
    finite = codes & 127 != 127
    np.testing.assert_array_equal(_TABLES["F8_E4M3"][finite], e4m3(codes[finite]))
    assert np.isnan(_TABLES["F8_E4M3"][~finite]).all()


@pytest.mark.parity
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_every_code_of_fp8_is_that_of_torch(name: str) -> None:
    import torch

    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, name))
    ours = _TABLES["F8_E4M3" if "e4m3" in name else "F8_E5M2"]
    np.testing.assert_array_equal(ours, codes.float().numpy())


# A whole model


def quantized_checkpoint(folder: Path, method: str, **fields: Any) -> dict[str, Array]:
    """A tiny Llama whose one matrix that has this shape is quantized; its values by name."""
    settings, pack = METHODS[method]
    config = tiny_config(hidden_size=N_OUT, intermediate_size=N_IN, quantization_config=settings, **fields)
    tensors: Parts = {}
    expected = {}
    for name, array in tiny_tensors(config).items():
        if name.endswith("mlp.down_proj.weight"):
            parts, expected[name] = pack(name.removesuffix(".weight"))
            tensors |= parts
        else:
            tensors[name] = ("BF16", array)
    folder.mkdir()
    write_json(folder / "config.json", config)
    write_typed(folder / "model.safetensors", tensors)
    write_tiny_tokenizer(folder)
    return expected


def matrices(path: Path, n_bytes: int) -> dict[str, bytes]:
    data = path.read_bytes()
    return {t.name: data[t.offset : t.offset + n_bytes] for t in read_gguf(path).tensors if "ffn_down" in t.name}


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_model_is_converted(method: str, tmp_path: Path) -> None:
    expected = quantized_checkpoint(tmp_path / "c", method)
    convert_checkpoint(tmp_path / "c", tmp_path / "f32.gguf", file_type("F32"))
    found = matrices(tmp_path / "f32.gguf", 4 * N_OUT * N_IN)
    for block, values in enumerate(expected.values()):
        assert found[f"blk.{block}.ffn_down.weight"] == values.astype(np.float32).tobytes()
    convert_checkpoint(tmp_path / "c", tmp_path / "bf16.gguf", file_type("BF16"))
    for block, values in enumerate(expected.values()):
        rounded = to_dtype(np.ascontiguousarray(values, np.float32), "BF16")
        assert matrices(tmp_path / "bf16.gguf", 2 * N_OUT * N_IN)[f"blk.{block}.ffn_down.weight"] == rounded.tobytes()


# What llama.cpp's converter decodes too: of the others it stops on the form or the strategy
PEER_DECODES = ["fp8", "fp8 blocks", "compressed int8", "compressed int4", "gptq", "gptq order", "gptq 2 bits"]
PEER_DECODES += ["gptq 8 bits", "gptq v2", "modelopt", "compressed packed int8"]


@pytest.mark.parity
@pytest.mark.parametrize("method", PEER_DECODES)
def test_equals_what_llama_cpp_decodes(method: str, tmp_path: Path, starter_model: Path) -> None:
    need_peer()
    quantized_checkpoint(tmp_path / "c", method, vocab_size=VOCABULARY["sentencepiece"])
    (tmp_path / "c" / "tokenizer.json").unlink()
    write_tokenizer("sentencepiece", tmp_path / "c", starter_model)
    convert_checkpoint(tmp_path / "c", tmp_path / "ours.gguf", file_type("F32"))
    peer_convert(tmp_path / "c", tmp_path / "theirs.gguf", "f32")
    n = 4 * N_OUT * N_IN
    assert matrices(tmp_path / "ours.gguf", n) == matrices(tmp_path / "theirs.gguf", n)


# MXFP4


def mxfp4(shape: tuple[int, ...]) -> tuple[Parts, Array]:
    """Experts as gpt-oss stores them, [experts, rows, columns]."""
    codes = RANDOM.integers(0, 16, shape)
    exponents = RANDOM.integers(118, 124, (*shape[:-1], shape[-1] // 32)).astype(np.uint8)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.where(codes & 8, -1, 1) * magnitudes[codes & 7] * np.repeat(2.0 ** (exponents - 127.0), 32, -1)
    pairs = codes.reshape(*exponents.shape, 16, 2).astype(np.uint8)
    halves = pairs[..., 0] | pairs[..., 1] << 4
    parts = {"experts.down_proj_blocks": typed(halves), "experts.down_proj_scales": typed(exponents)}
    return parts, values.astype(np.float32)


def test_mxfp4_decoded_and_as_it_is(tmp_path: Path) -> None:
    parts, expected = mxfp4((3, 4, 96))
    weights = decode(tmp_path / "c", parts, {"quant_method": "mxfp4"})["experts.down_proj.weight"]
    np.testing.assert_array_equal(weights.values(), expected)
    np.testing.assert_array_equal(
        weights.read(np.array([5, 2]), slice(30, 70)), expected.reshape(12, 96)[[5, 2], 30:70]
    )
    assert weights.packed is not None
    import gguf

    kept = weights.packed.read(np.arange(12))
    again = gguf.quants.dequantize(kept.reshape(12, -1), gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(again.reshape(expected.shape), expected)


# What does not fit


def test_unknown_methods_are_refused_by_name(tmp_path: Path) -> None:
    for method in ("hqq", "aqlm", "quark", "\x1b[2J" + "x" * 500, None):
        with pytest.raises(UnsupportedError, match="is quantized by") as raised:
            decode(tmp_path / "c", {"w": typed(np.zeros((2, 2), np.float32))}, {"quant_method": method, "bits": 4})
        assert str(raised.value).isprintable()


@pytest.mark.parametrize("method", METHODS)
def test_each_part_is_needed(method: str, tmp_path: Path) -> None:
    settings, pack = METHODS[method]
    parts, _ = pack("m")
    optional = (".g_idx", "_zero_point", "_g_idx", "_shape", ".weight_format")
    for name in parts:
        if name.endswith(optional) or (name.endswith(("_scale", "_scale_inv", ".absmax", ".SCB"))):
            continue  # without its mark a matrix is one of another dtype, which planning refuses
        rest = {other: part for other, part in parts.items() if other != name}
        found: dict[str, Weights] = {}
        said = message_of(lambda rest=rest, found=found: found.update(decode(tmp_path / "c", rest, settings)))  # type: ignore[misc]
        if not said:  # no mark of a quantized matrix is left
            assert "m.weight" not in found or found["m.weight"].dtype not in (None, "F32", "BF16", "F16")
        else:
            assert "lacks" in said


@pytest.mark.parametrize("method", METHODS)
@quick
@given(data=st.data())
def test_parts_of_other_shapes_give_a_named_error_at_most(method: str, data: Any, tmp_path: Path) -> None:
    settings, pack = METHODS[method]
    parts, _ = pack("m")
    name = data.draw(st.sampled_from(sorted(parts)))
    dtype, array = parts[name]
    change = data.draw(st.sampled_from(["cut", "flat", "turned", "huge", "empty"]))
    flat = array.reshape(-1)
    changed = {
        "cut": array[:-1] if array.ndim else array,
        "flat": flat,
        "turned": array.T,
        "huge": np.tile(array, (3,) * max(1, array.ndim)),
        "empty": flat[:0],
    }[change]

    def everything() -> None:
        found = decode(tmp_path / "c", {**parts, name: (dtype, np.ascontiguousarray(changed))}, settings)
        if "m.weight" in found and found["m.weight"].dtype is None:
            found["m.weight"].values()

    assert message_of(everything).isprintable()


@pytest.mark.parametrize(
    "change",
    [{"bits": 3}, {"bits": "4"}, {"bits": 1 << 40}, {"group_size": 0.5}, {"bits": None}],
    ids=str,
)
def test_settings_that_are_not_decoded(change: dict[str, Any], tmp_path: Path) -> None:
    settings, pack = METHODS["gptq"]
    with pytest.raises(UnsupportedError, match=f"'{next(iter(change))}'"):
        decode(tmp_path / "c", pack("m")[0], settings | change)


def test_awq_in_another_layout(tmp_path: Path) -> None:
    settings, pack = METHODS["awq"]
    with pytest.raises(UnsupportedError, match=r"version .gemv. is not decoded"):
        decode(tmp_path / "c", pack("m")[0], settings | {"version": "gemv"})


def test_a_quantized_text_part_is_found(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path / "c", "gptq")
    edit_json(
        tmp_path / "c" / "config.json",
        lambda config: config.update(text_config={"quantization_config": config.pop("quantization_config")}),
    )
    assert plan_conversion(tmp_path / "c", file_type("Q8_0")).n_weights
