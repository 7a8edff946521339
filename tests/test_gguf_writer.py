"""Header bytes against those of gguf's own writer."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from convert.gguf_writer import TensorEntry, header_bytes, padded
from models.gguf_file import LazyArray, read_gguf


def fill(writer: gguf.GGUFWriter) -> None:
    """Every kind of value that a model's metadata has."""
    writer.add_uint8("x.u8", 255)
    writer.add_int8("x.i8", -128)
    writer.add_uint16("x.u16", 65535)
    writer.add_int16("x.i16", -1)
    writer.add_uint32("x.u32", 2**32 - 1)
    writer.add_int32("x.i32", -(2**31))
    writer.add_uint64("x.u64", 2**64 - 1)
    writer.add_int64("x.i64", -(2**63))
    writer.add_float32("x.f32", 1e-5)
    writer.add_float64("x.f64", 1e300)
    writer.add_bool("x.yes", True)
    writer.add_bool("x.no", False)
    writer.add_string("x.text", "注意力 🙂\0 ")
    writer.add_token_list([b"a", "ü".encode(), b"\xff\xfe", b"x" * 1000, b"c"])
    writer.add_token_scores([0.0, -1.5, -1000.0])
    writer.add_token_types([1, 2, 6])
    writer.add_array("x.names", ["one", "zwei", "三"])
    writer.add_array("x.flags", [True, False, True])


TENSORS = [("a.weight", (3, 64)), ("a.bias", (5,)), ("experts", (2, 3, 32))]


def test_equals_the_bytes_of_gguf(tmp_path: Path) -> None:
    theirs = gguf.GGUFWriter(str(tmp_path / "theirs.gguf"), "llama")
    fill(theirs)
    for name, shape in TENSORS:
        theirs.add_tensor(name, np.zeros(shape, np.float32))
    theirs.write_header_to_file()
    theirs.write_kv_data_to_file()
    theirs.write_ti_data_to_file()
    theirs.close()
    ours = gguf.GGUFWriter(path=None, arch="llama")
    fill(ours)
    entries = [TensorEntry(name, shape[::-1], 0, 4 * int(np.prod(shape))) for name, shape in TENSORS]
    header = header_bytes(ours.kv_data[0], entries)
    expected = (tmp_path / "theirs.gguf").read_bytes()
    assert header.rstrip(b"\0") == expected.rstrip(b"\0")
    assert len(header) == padded(len(expected))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(path=None, arch="llama")
    fill(writer)
    entries = [TensorEntry("a", (64, 3), 30, 384), TensorEntry("b", (5,), 0, 20), TensorEntry("c", (32,), 8, 34)]
    header = header_bytes(writer.kv_data[0], entries)
    path = tmp_path / "x.gguf"
    path.write_bytes(header + bytes(sum(padded(entry.nbytes) for entry in entries)))
    file = read_gguf(path)
    assert file.metadata["x.text"] == "注意力 🙂\0 "
    names = file.metadata["x.names"]
    assert isinstance(names, LazyArray)
    assert list(names) == ["one", "zwei", "三"]
    placed = [(t.name, t.shape, t.type, t.offset - len(header), t.nbytes) for t in file.tensors]
    assert placed == [("a", (64, 3), "BF16", 0, 384), ("b", (5,), "F32", 384, 20), ("c", (32,), "Q8_0", 416, 34)]


def test_padding_ends_at_multiples_of_32() -> None:
    assert [padded(n) for n in (0, 1, 31, 32, 33)] == [0, 32, 32, 32, 64]


@pytest.mark.parametrize("value", [2**32, -1])
def test_a_value_that_its_type_does_not_hold(value: int) -> None:
    writer = gguf.GGUFWriter(path=None, arch="llama")
    writer.add_uint32("x", value)
    with pytest.raises(struct.error):
        header_bytes(writer.kv_data[0], [])
