"""Reading a checkpoint: everything that a stranger may have put into the folder."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.checkpoint import open_checkpoint, read_json
from convert.tensor_info import DTYPE_BYTES
from models.errors import CheckpointError, TensorError, UnsupportedError
from tests.checkpoints import (
    INDEX,
    edit_header,
    edit_json,
    message_of,
    quick,
    tiny_checkpoint,
    tiny_config,
    write_json,
    write_safetensors,
)

Change = Callable[[dict[str, Any]], Any]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "tiny")


def small(folder: Path) -> Path:
    """A folder of one shard with three small tensors, as quick to read as can be."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", tiny_config())
    tensors = {name: np.full((2, 4), i, np.float32) for i, name in enumerate(("a", "b", "c"))}
    write_safetensors(folder / "model.safetensors", tensors)
    return folder / "model.safetensors"


def set_entry(name: str, **fields: object) -> Change:
    return lambda header: header[name].update(fields)


def test_says_where_every_tensor_lies(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert {tensor.path.name for tensor in checkpoint.tensors.values()} == set(SHARDS)
    norm = checkpoint.tensors[NORM]
    assert (norm.dtype, norm.shape, norm.nbytes) == ("BF16", (64,), 128)
    written = norm.path.read_bytes()[norm.offset : norm.offset + norm.nbytes]
    assert 0.5 < np.frombuffer(written, np.uint16).astype(np.uint32).__lshift__(16).view(np.float32).mean() < 1.5
    assert checkpoint.n_bytes == json.loads((folder / INDEX).read_text())["metadata"]["total_size"]


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    small(tmp_path)
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "b", "c"]


def test_a_tensor_of_no_dimensions_is_read(tmp_path: Path) -> None:
    small(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {"scalar": np.array(1.0, np.float32)})
    assert open_checkpoint(tmp_path).tensors["scalar"].shape == ()


def test_json_may_begin_with_a_byte_order_mark(folder: Path) -> None:
    config = folder / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert open_checkpoint(folder).architecture == "LlamaForCausalLM"


# The folder and config.json


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        open_checkpoint(tmp_path / "absent")


def test_a_file_is_no_checkpoint(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        open_checkpoint(folder / "config.json")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 50_000, b'{"a": 1e', b'{"n": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "utf-16", "deep-list", "deep-object", "cut-number", "long-number"],
)
def test_config_that_is_not_json(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(folder)


def test_config_that_is_no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="does not hold a JSON object"):
        open_checkpoint(folder)


def test_config_that_is_a_directory(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="is not a file"):
        open_checkpoint(folder)


def test_config_that_is_a_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(CheckpointError, match="is not a file"):
        open_checkpoint(folder)


def test_git_lfs_pointers_are_named_as_such(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    (folder / SHARDS[0]).write_text(pointer)
    with pytest.raises(CheckpointError, match="Git LFS pointer") as raised:
        open_checkpoint(folder)
    assert "git lfs pull" in raised.value.hint
    (folder / "config.json").write_text(pointer)
    with pytest.raises(CheckpointError, match="not JSON") as raised:
        open_checkpoint(folder)
    assert "git lfs pull" in raised.value.hint


@pytest.mark.parametrize("value", [None, [], "LlamaForCausalLM", [3], {}])
def test_no_architecture(folder: Path, value: object) -> None:
    edit_json(folder / "config.json", lambda config: config.update(architectures=value))
    with pytest.raises(CheckpointError, match="names no architecture"):
        _ = open_checkpoint(folder).architecture


def test_weights_in_another_format(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    with pytest.raises(CheckpointError, match=r"has no model\*\.safetensors or pytorch_model\*\.bin"):
        open_checkpoint(folder)
    (folder / "consolidated.00.pth").write_bytes(b"PK")
    with pytest.raises(UnsupportedError, match=r"consolidated\.00\.pth but no model\*\.safetensors"):
        open_checkpoint(folder)


def test_shards_without_tensors(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", tiny_config())
    write_safetensors(tmp_path / "model.safetensors", {})
    with pytest.raises(CheckpointError, match="hold no tensors"):
        open_checkpoint(tmp_path)


# The index


def test_shard_missing_from_disk(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{SHARDS[1]} is named in {INDEX} but is not in") as raised:
        open_checkpoint(folder)
    assert "1 of 2 shards" in raised.value.hint


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b",
        "a\\b",
        "C:x",
        "a\0b",
        "\x1b[2J",
        "a\u202eb",
        "x" * 5000,
    ],
    ids=lambda name: ascii(name[:20]),
)
def test_index_that_points_elsewhere(folder: Path, name: str) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({NORM: name}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        open_checkpoint(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": None}])
def test_index_without_a_weight_map(folder: Path, index: object) -> None:
    write_json(folder / INDEX, index)
    with pytest.raises(CheckpointError, match="has no 'weight_map'"):
        open_checkpoint(folder)


def test_index_that_names_nothing(folder: Path) -> None:
    write_json(folder / INDEX, {"weight_map": {}})
    with pytest.raises(CheckpointError, match="hold no tensors"):
        open_checkpoint(folder)


def test_tensor_of_the_index_that_no_shard_has(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update(ghost=SHARDS[0]))
    with pytest.raises(TensorError, match=f"'ghost' is named in the index but is not in {SHARDS[0]}"):
        open_checkpoint(folder)


def test_tensor_that_the_index_does_not_name(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(NORM))
    with pytest.raises(TensorError, match=rf"'{NORM}' in {SHARDS[1]} is not in the index"):
        open_checkpoint(folder)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    shard = small(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(shard.read_bytes())
    with pytest.raises(TensorError, match=r"'a' is in model-2\.safetensors and in model\.safetensors"):
        open_checkpoint(tmp_path)


# A shard


@pytest.mark.parametrize("size", [0, 1, 7])
def test_empty_shard(folder: Path, size: int) -> None:
    (folder / SHARDS[0]).write_bytes(b"x" * size)
    with pytest.raises(CheckpointError, match=f"has {size} bytes"):
        open_checkpoint(folder)


@pytest.mark.parametrize("lost", [1, 100, 4096])
def test_shard_cut_short(folder: Path, lost: int) -> None:
    shard = folder / SHARDS[0]
    shard.write_bytes(shard.read_bytes()[:-lost])
    with pytest.raises(CheckpointError, match="cut short"):
        open_checkpoint(folder)


def test_shard_cut_within_its_header(folder: Path) -> None:
    shard = folder / SHARDS[0]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"its header says .* the file has 100"):
        open_checkpoint(folder)


@pytest.mark.parametrize("length", [2**20, 2**40, 2**64 - 1])
def test_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    shard = small(tmp_path)
    shard.write_bytes(struct.pack("<Q", length) + shard.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=f"its header says {length:,} bytes"):
        open_checkpoint(tmp_path)


def test_huge_header_is_not_read(tmp_path: Path) -> None:
    shard = small(tmp_path)
    with shard.open("wb") as file:
        file.write(struct.pack("<Q", 2**33))
        file.truncate(2**34)
    with pytest.raises(CheckpointError, match="its header says"):
        open_checkpoint(tmp_path)


def test_header_that_is_not_json(tmp_path: Path) -> None:
    shard = small(tmp_path)
    shard.write_bytes(struct.pack("<Q", 8) + b"\xff" * 8)
    with pytest.raises(CheckpointError, match="not JSON"):
        open_checkpoint(tmp_path)


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    shard = small(tmp_path)
    shard.write_bytes(shard.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="longer than its tensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_entry("b", data_offsets=[16, 48]), "'b' .*overlaps"),
        (set_entry("b", data_offsets=[0, 32]), "'b' .*overlaps"),
        (set_entry("c", data_offsets=[96, 128]), "'c' .*leaves a hole"),
        (lambda header: header.pop("b"), "'c' .*leaves a hole"),
        (lambda header: header.pop("c"), "longer than its tensors"),
        (set_entry("c", data_offsets=[2**40, 2**40 + 32]), "'c' .*leaves a hole"),
        (set_entry("c", data_offsets=[64, 2**61], shape=[2, 2**60]), "'c' .*does not fit"),
        (set_entry("c", data_offsets=[64, 64 + 2**32], shape=[2**30]), "cut short"),
        (set_entry("b", data_offsets=[64, 32]), "'b' .*does not fit its -32 bytes"),
        (set_entry("b", data_offsets=[-32, 0]), "'b' .*are not two positions"),
        (set_entry("b", data_offsets=[32]), "'b' .*are not two positions"),
        (set_entry("b", data_offsets=None), "'b' .*are not two positions"),
        (set_entry("b", data_offsets=[32.0, 64.0]), "'b' .*are not two positions"),
        (set_entry("b", data_offsets=[10**30, 10**31]), "'b' .*are not two positions"),
        (set_entry("b", shape=[2, 5]), r"'b' .*its shape \[2, 5\] as F32 does not fit its 32 bytes"),
        (set_entry("b", shape=[True, 8]), "'b' .*not a list of up to 8 sizes"),
        (set_entry("b", shape=[2, -4]), "'b' .*not a list of up to 8 sizes"),
        (set_entry("b", shape=[1, 1, 1, 1, 1, 1, 1, 2, 4]), "'b' .*not a list of up to 8 sizes"),
        (set_entry("b", shape=[0, 4]), r"'b' .*its shape \[0, 4\] as F32 does not fit its 32 bytes"),
        (set_entry("b", dtype="F7"), "'b' .*its dtype 'F7' is unknown"),
        (set_entry("b", dtype=None), "'b' .*its dtype 'None' is unknown"),
        (set_entry("b", dtype=["F32"]), "'b' .*its dtype .* is unknown"),
        (lambda header: header.update(b=[]), "'b' .*entry is not an object"),
    ],
)
def test_header_at_odds_with_itself(tmp_path: Path, change: Change, message: str) -> None:
    edit_header(small(tmp_path), change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_every_dtype_is_listed(tmp_path: Path, dtype: str) -> None:
    """A model may not need the tensor."""
    edit_header(small(tmp_path), set_entry("b", dtype=dtype, shape=[32 // DTYPE_BYTES[dtype]]))
    assert open_checkpoint(tmp_path).tensors["b"].dtype == dtype


# What a stranger writes is quoted, cut and harmless


def test_names_reach_no_terminal_as_they_are(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\u202e" + "x" * 100_000

    def rename(header: dict[str, Any]) -> None:
        header[evil] = header.pop("b") | {"dtype": "\x1b[2J"}

    edit_header(small(tmp_path), rename)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(tmp_path)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000


# Nothing but named errors, whatever the bytes

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@quick
@given(data=st.data())
def test_any_header(tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["a", "b", "c"]))
    entry = {"dtype": "F32", "shape": [2, 4], "data_offsets": [32, 64]}
    key = data.draw(st.sampled_from(list(entry)))
    sizes = st.lists(st.integers(-1, 2**63), max_size=3)
    edit_header(small(tmp_path), lambda header: header.update({name: entry | {key: data.draw(values | sizes)}}))
    assert message_of(lambda: open_checkpoint(tmp_path)).isprintable()


@quick
@given(start=st.integers(0, 300), junk=st.binary(min_size=1, max_size=16))
def test_any_bytes_in_a_shard(tmp_path: Path, start: int, junk: bytes) -> None:
    shard = small(tmp_path)
    data = bytearray(shard.read_bytes())
    data[start : start + len(junk)] = junk
    shard.write_bytes(data)
    assert message_of(lambda: open_checkpoint(tmp_path)).isprintable()


@quick
@given(content=st.binary(max_size=64))
def test_any_shard(tmp_path: Path, content: bytes) -> None:
    small(tmp_path).write_bytes(content)
    assert message_of(lambda: open_checkpoint(tmp_path)).isprintable()


@quick
@given(index=values | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(), st.text(), max_size=3)}))
def test_any_index(tmp_path: Path, index: object) -> None:
    small(tmp_path)
    write_json(tmp_path / INDEX, index)
    assert message_of(lambda: open_checkpoint(tmp_path)).isprintable()


@quick
@given(content=st.binary(max_size=64) | values.map(lambda value: json.dumps(value).encode()))
def test_any_json_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert message_of(lambda: read_json(path)).isprintable()
