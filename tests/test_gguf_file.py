"""A GGUF is built in memory with gguf's own writer, then bent; gguf is the oracle for the unbent one."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import ModelFileError
from models.gguf_file import peek_gguf, read_gguf
from models.gguf_parts import check_model_file
from models.gguf_types import FILE_TYPES, TENSOR_TYPES
from models.native import capture_log, shared_library
from models.text import printable


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole little GGUF: metadata of every kind, a vocabulary, two tensors."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("小磨 🌾")
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q8_0))
    writer.add_context_length(4096)
    writer.add_float32("llama.rope.freq_base", 10000.5)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_token_list(["<s>", "é", "中", ""])
    writer.add_token_scores([0.0, -1.0, -2.0, -3.0])
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("a.weight", np.ones((3, 64), dtype=np.float32))
    rows = gguf.quants.quantize(np.ones((2, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("b.weight", rows, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def put(folder: Path, data: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return path


def test_tables_hold_the_names_of_gguf_and_the_sizes_of_llama_cpp() -> None:
    # llama.cpp may know a type before gguf does; and gguf 0.19.0 has a wrong size for Q8_1, which no file uses.
    known = {int(t): t.name for t in gguf.constants.GGML_QUANT_SIZES}
    assert known.items() <= {number: name for number, (name, _, _) in TENSOR_TYPES.items()}.items()
    names = {int(t): re.sub("^(ALL|MOSTLY)_", "", t.name) for t in gguf.LlamaFileType if t.name != "GUESSED"}
    assert names.items() <= FILE_TYPES.items()
    ggml = shared_library("ggml-base")
    for number, (_, block, size) in TENSOR_TYPES.items():
        assert (ggml.ggml_blck_size(number), ggml.ggml_type_size(number)) == (block, size)


def test_reads_what_gguf_wrote(tmp_path: Path, small: bytes) -> None:
    path = put(tmp_path, small)
    check_model_file(path)
    found = read_gguf(path)
    assert (found.architecture, found.name, found.file_type) == ("llama", "小磨 🌾", "Q8_0")
    assert (found.context_length, found.chat_template) == (4096, "{{ messages }}")
    assert found.metadata["llama.rope.freq_base"] == 10000.5
    assert found.metadata["tokenizer.ggml.add_bos_token"] is True
    assert list(found.metadata["tokenizer.ggml.tokens"]) == ["<s>", "é", "中", ""]  # type: ignore[arg-type]
    assert found.parameters == 3 * 64 + 2 * 64
    assert found.bytes_by_type() == {"F32": 768, "Q8_0": 136}
    assert found.bits_per_weight == pytest.approx(8 * (768 + 136) / 320)


def test_agrees_with_gguf_reader_on_a_real_model(starter_model: Path) -> None:
    found, oracle = read_gguf(starter_model), gguf.GGUFReader(starter_model)
    assert [(t.name, list(t.shape), t.type, t.offset, t.nbytes) for t in found.tensors] == [
        (t.name, [int(n) for n in t.shape], t.tensor_type.name, t.data_offset, t.n_bytes) for t in oracle.tensors
    ]
    for key, value in found.metadata.items():
        expected = oracle.fields[key].contents()
        assert value == expected if not isinstance(expected, list) else list(value) == expected  # type: ignore[arg-type]


def test_peek_stops_before_the_vocabulary(tmp_path: Path, small: bytes) -> None:
    peeked = peek_gguf(put(tmp_path, small))
    assert (peeked.name, peeked.file_type) == ("小磨 🌾", "Q8_0")
    assert peeked.chat_template is None
    assert peeked.tensors == ()


def test_peek_reads_on_where_the_file_type_comes_late(tmp_path: Path) -> None:
    name, n_tensors = tensor(b"t.weight", (64,), 8), 1
    tokens = string(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 1) + string(b"a")
    late = string(b"general.file_type") + struct.pack("<II", 4, 15)
    assert peek_gguf(put(tmp_path, header(tokens + late, 2, name, n_tensors))).file_type == "Q4_K_M"
    assert peek_gguf(put(tmp_path, header(tokens, 1, name, n_tensors))).file_type == "Q8_0"


def refuse(path: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        check_model_file(path)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"GGUF", "cut short"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"\n  <html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs"),
        (b"PK\x03\x04" + b"x" * 100, "zip"),
        (b"\x80\x02}q\x00", "pickle"),
        (struct.pack("<Q", 20) + b'{"__metadata__":{}}  ', "safetensors"),
        (b"{}", "JSON"),
        (b"tjgg" + b"\0" * 8, "before GGUF"),
        (b"\0" * 64, "zeros"),
        (b"\x1b]0;owned\x07 hello", "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), "1099511627776 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, (1 << 64) - 1), "metadata keys"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "no architecture"),
    ],
)
def test_refuses_what_is_no_gguf(tmp_path: Path, data: bytes, says: str) -> None:
    assert says in refuse(put(tmp_path, data))


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    assert "is a directory" in refuse(tmp_path)
    assert "does not exist" in refuse(tmp_path / "no.gguf")
    assert "does not exist" in refuse(tmp_path / "no\x1b[31m" / "no.gguf")
    assert "cannot be read" in refuse(tmp_path / "a\0b")
    assert "not a regular file" in refuse(Path("/dev/null"))


def header(keys: bytes = b"", n_keys: int = 0, tensors: bytes = b"", n_tensors: int = 0, data: int = 4096) -> bytes:
    text = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys + 1)
    text += string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama")
    text += keys + tensors
    return text + b"\0" * (-len(text) % 32 + data)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("keys", "n_keys", "says"),
    [
        (string(b"k\x1b[2J") + struct.pack("<I", 99), 1, r"'k\x1b[2J' has the unknown value type 99"),
        (string(b"k") + struct.pack("<IIQ", 9, 9, 1), 1, "array of the unknown value type 9"),
        (string(b"k") + struct.pack("<IIQ", 9, 8, 1 << 60), 1, "strings, more than"),
        (string(b"k") + struct.pack("<IIQQ", 9, 8, 3, 1 << 60), 1, "cut short or damaged"),
        (string(b"k") + struct.pack("<IIQ", 9, 4, 1 << 62), 1, "cut short or damaged"),
        (string(b"k") + struct.pack("<IQ", 8, (1 << 64) - 1), 1, "cut short or damaged"),
        (string(b"general.architecture") + struct.pack("<II", 4, 1), 1, "appears twice"),
        (string(b"") + struct.pack("<II", 4, 1), 1, "is empty"),
        (string(b"general.alignment") + struct.pack("<II", 4, 48), 1, "no power of two"),
        (string(b"general.alignment") + struct.pack("<II", 4, 0), 1, "no power of two"),
        (string(b"general.alignment") + struct.pack("<I", 8) + string(b"a"), 1, "takes type 4 only"),
        (string(b"split.no") + struct.pack("<II", 4, 1), 1, "takes type 2 only"),
        (string(b"general.name\0") + struct.pack("<II", 4, 1), 1, "has a NUL in it"),
        (string(b"split.no") + struct.pack("<IH", 2, 1)
         + string(b"split.count") + struct.pack("<IH", 2, 3), 2, "part 2 of 3"),
    ],
)  # fmt: skip
def test_refuses_bent_metadata(tmp_path: Path, keys: bytes, n_keys: int, says: str) -> None:
    assert says in refuse(put(tmp_path, header(keys, n_keys)))


@pytest.mark.parametrize(
    ("infos", "says"),
    [
        ([tensor(b"t", (32,), 250)], "unknown tensor type 250"),
        ([tensor(b"t", (33,), 8)], "multiple of 32"),
        ([tensor(b"t", (1, 1, 1, 1, 1))], "5 dimensions"),
        ([tensor(b"t", (1 << 40, 1 << 40))], "impossible shape"),
        ([tensor(b"t", (1 << 63,))], "impossible shape"),
        ([tensor(b"t" * 64, (32,))], "more than 63"),
        ([tensor(b"t", (32,), offset=32)], "gap"),
        ([tensor(b"t", (32,), offset=7)], "misaligned"),
        ([tensor(b"t", (32,)), tensor(b"u", (32,), offset=96)], "overlaps"),
        ([tensor(b"t", (32,)), tensor(b"t", (32,), offset=128)], "appears twice"),
        ([tensor(b"t", (1 << 20,))], "tensors need"),
        ([tensor(b"\xff\x9b\xe2\x80\xae", (1 << 20,), 250)], "unknown tensor type"),
    ],
)
def test_refuses_bent_tensors(tmp_path: Path, infos: list[bytes], says: str) -> None:
    path = put(tmp_path, header(tensors=b"".join(infos), n_tensors=len(infos)))
    assert says in refuse(path)


def test_a_cut_file_says_both_sizes(tmp_path: Path, small: bytes) -> None:
    for size in range(4, len(small) - 40, 7):
        says = refuse(put(tmp_path, small[:size]))
        assert "cut short" in says or "cannot hold" in says
    says = refuse(put(tmp_path, small[:-64]))
    assert str(len(small) - 64) in says
    assert "need" in says


quick = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
bends = st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=6)


@quick
@given(where=bends, size=st.integers(0, 3000))
def test_bent_bytes_give_nothing_but_a_model_file_error(
    tmp_path: Path, small: bytes, where: list[tuple[int, int]], size: int
) -> None:
    data = bytearray(small)
    for position, value in where:
        data[position] = value
    only_named(check_model_file, put(tmp_path, bytes(data)))
    only_named(peek_gguf, put(tmp_path, bytes(data[:size])))


@quick
@given(st.binary(max_size=400))
def test_random_bytes_give_nothing_but_a_model_file_error(tmp_path: Path, data: bytes) -> None:
    only_named(check_model_file, put(tmp_path, data))
    only_named(check_model_file, put(tmp_path, b"GGUF\x03\0\0\0" + data))
    only_named(check_model_file, put(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + data))


class InitParams(ctypes.Structure):
    """`gguf_init_params`: no tensor data, no ggml context."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@quick
@given(bends)
def test_what_passes_here_is_opened_by_llama_cpp(tmp_path: Path, small: bytes, where: list[tuple[int, int]]) -> None:
    data = bytearray(small)
    for position, value in where:
        data[position] = value
    path = put(tmp_path, bytes(data))
    try:
        read_gguf(path)
    except ModelFileError:
        return
    ggml = shared_library("ggml-base")
    ggml.gguf_init_from_file.restype = ctypes.c_void_p
    ggml.gguf_free.argtypes = [ctypes.c_void_p]
    with capture_log() as log:
        opened = ggml.gguf_init_from_file(str(path).encode(), InitParams(True, None))
    assert opened, log
    ggml.gguf_free(opened)


def only_named(action: Callable[[Path], object], path: Path) -> None:
    try:
        action(path)
    except ModelFileError as error:
        message = str(error)
    else:
        message = ""
    assert message == "" or message.isprintable()


def test_printable_escapes_what_could_move_a_terminal() -> None:
    assert printable("a\x1b[31m\u202eb\x9bc\n中🌾") == r"a\x1b[31m\u202eb\x9bc\n中🌾"
    assert len(printable("x" * 1000)) == 200
