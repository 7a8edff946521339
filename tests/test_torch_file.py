"""Reading what torch.save wrote, and what somebody made to look like it."""

from __future__ import annotations

import functools
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.checkpoint import open_checkpoint
from convert.converter import convert_checkpoint
from convert.file_types import file_type
from convert.stored import stored
from convert.torch_file import read_torch_file
from models.errors import CheckpointError, TensorError
from tests.checkpoints import (
    edit_json,
    tiny_checkpoint,
    tiny_config,
    tiny_tensors,
    write_json,
    write_shards,
)
from tests.torch_files import (
    DATA,
    EIGHT,
    VALID,
    Entry,
    applied,
    archive,
    end_well_or_by_name,
    hooks,
    legacy_form,
    legacy_head,
    local_header,
    mapping,
    named,
    number,
    program,
    read,
    refusal,
    sizes,
    state,
    storage,
    tensor,
    text,
    thorough,
    values,
    views,
    write_torch_file,
    zip_form,
)

BIN_INDEX = "pytorch_model.bin.index.json"
# What is meant well


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_tensor_of_a_state_dict(tmp_path: Path, legacy: bool) -> None:
    tensors = tiny_tensors(tiny_config())
    tensors["half"], tensors["single"] = EIGHT.astype(np.float16), EIGHT
    write_torch_file(tmp_path / "x.bin", tensors, legacy=legacy)
    found = read_torch_file(tmp_path / "x.bin")
    assert [info.name for info in found] == list(tensors)
    for info in found:
        np.testing.assert_array_equal(values(info), tensors[info.name])
        assert info.strides is None


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_views_of_one_storage(tmp_path: Path, legacy: bool) -> None:
    found = read(tmp_path, legacy_form(views(b"N"), {"0": (8, DATA)}) if legacy else zip_form(views(), {"0": DATA}))
    assert found["whole"].offset == found["tied"].offset
    assert {name: values(info).tolist() for name, info in found.items()} == {
        "whole": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "tied": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "transposed": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "tail": [5, 6, 7],
        "column": [[1], [5]],
        "scalar": 7,
        "empty": [],
        "plain": [2, 5],
        "parameter": [4, 5, 6, 7],
    }
    strided = {name: info.strides for name, info in found.items() if info.strides is not None}
    assert strided == {"transposed": (1, 4), "column": (4, 7), "plain": (3,)}


@pytest.mark.parametrize("form", VALID)
def test_views_are_converted_by_rows(tmp_path: Path, form: str) -> None:
    for name, info in read(tmp_path, VALID[form]).items():
        if name not in ("scalar", "empty"):
            weights, expected = stored(info), values(info)
            np.testing.assert_array_equal(weights.values(), expected)
            matrix = expected.reshape(-1, weights.row_length)
            rows, columns = np.array([len(matrix) - 1, 0, 0]), slice(weights.row_length - 1, weights.row_length)
            np.testing.assert_array_equal(weights.read(rows, columns), matrix[rows, columns])


def test_a_view_whose_file_was_cut_or_lost_after_it_was_listed(tmp_path: Path) -> None:
    weights = stored(read(tmp_path, VALID["zip"])["transposed"])
    os.truncate(tmp_path / "pytorch_model.bin", 40)
    with pytest.raises(TensorError, match="was cut short while it was read"):
        weights.values()
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(TensorError, match="cannot read"):
        weights.values()


def test_the_attributes_of_a_state_dict_are_passed_over(tmp_path: Path) -> None:
    versions = mapping({"_metadata": mapping({"": mapping({"version": number(1)})})})
    data = program(hooks(), b"(", text("a"), tensor(), b"u", versions, b"b")
    assert values(read(tmp_path, zip_form(data, {"0": DATA}))["a"]).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_dtypes_that_are_stored_as_bytes(tmp_path: Path) -> None:
    where = storage("0", "torch.storage.UntypedStorage", 32)
    arguments = (where, number(1), sizes((2,)), sizes((1,)), b"\x89", hooks())
    v3 = "torch._utils._rebuild_tensor_v3"
    found = read(
        tmp_path,
        zip_form(
            state(
                e4m3=applied(v3, *arguments, named("torch.float8_e4m3fn")),
                wide=applied(v3, *arguments, named("torch.uint64"), b"N"),
            ),
            {"0": np.arange(32, dtype=np.uint8).tobytes()},
        ),
    )
    assert (found["e4m3"].dtype, values(found["e4m3"]).tolist()) == ("F8_E4M3", [1, 2])
    assert found["wide"].dtype == "U64"
    assert values(found["wide"])[0] == 0x0F0E0D0C0B0A0908


# Tensors against their storages, and these against the file


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("offset", "shape", "strides", "fits"),
    [
        (0, (8,), (1,), True),
        (0, (9,), (1,), False),
        (1, (2, 4), (4, 1), False),
        (4, (1, 4), (2**61, 1), True),
        (0, (2, 4), (5, 1), False),
        (0, (2, 4), (2**61, 1), False),
        (0, (4, 2), (1, 4), True),
        (1, (4, 2), (1, 4), False),
        (0, (8, 2), (1, 0), False),
        (0, (2**40, 2**40), (0, 0), False),
        (0, (2**61,) * 8, (2**61,) * 8, False),
        (8, (0,), (1,), True),
        (9, (0,), (1,), False),
        (2**61, (0, 2**61), (1, 1), False),
        (7, (), (), True),
        (8, (), (), False),
    ],
)
def test_a_tensor_lies_within_its_storage(
    tmp_path: Path, legacy: bool, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], fits: bool
) -> None:
    value = state(a=tensor(storage(), offset, shape, strides))
    data = legacy_form(value, {"0": (8, DATA)}) if legacy else zip_form(value, {"0": DATA})
    if fits:
        expected = np.lib.stride_tricks.as_strided(EIGHT[offset:], shape, [4 * stride % 64 for stride in strides])
        np.testing.assert_array_equal(values(read(tmp_path, data)["a"]), expected)
    else:
        error = refusal(tmp_path, data)
        assert isinstance(error, TensorError)
        assert "'a'" in str(error)
        assert "does not fit its storage of 32 bytes" in str(error)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (storage(n_items=9), "its storage should have 36 bytes, and has 32"),
        (storage(n_items=2**61), "its storage should have"),
        (storage(kind="torch.DoubleStorage"), "its storage should have 64 bytes, and has 32"),
        (storage("1"), "its data is not in the file"),
        (storage("../data.pkl"), "its data is not in the file"),
        (storage("/etc/passwd"), "its data is not in the file"),
        (storage(""), "its data is not in the file"),
    ],
)
def test_a_storage_lies_within_the_archive(tmp_path: Path, where: bytes, message: str) -> None:
    assert message in str(refusal(tmp_path, zip_form(state(a=tensor(where)), {"0": DATA})))


# Archives that are not as torch.save writes them

PICKLE = state(a=tensor())
FIRST = Entry("m/data.pkl", PICKLE)
INNER = Entry("m/data/0", DATA)
AROUND = Entry("m/data/1", local_header(INNER) + DATA)  # an entry within the data of another
WITHIN = len(archive([FIRST, AROUND]).partition(AROUND.data)[0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (archive([FIRST, Entry("m/data/0", DATA, method=8)]), "'m/data/0' in .* is compressed"),
        (archive([Entry("m/data.pkl", PICKLE, method=8), INNER]), "'m/data.pkl' in .* is compressed"),
        (archive([FIRST, INNER, Entry("m/x", b"", method=99)]), "'m/x' in .* is compressed"),
        (archive([FIRST, Entry("m/data/0", DATA, flags=1)]), "is encrypted"),
        (archive([FIRST, INNER, INNER]), "the entry 'm/data/0' twice"),
        (archive([FIRST, Entry("n/data.pkl", PICKLE), INNER]), "has 2 entries 'NAME/data.pkl'"),
        (archive([INNER]), "has 0 entries 'NAME/data.pkl'"),
        (archive([Entry("data.pkl", PICKLE), INNER]), "has 0 entries"),
        (archive([Entry("a/b/data.pkl", PICKLE), INNER]), "has 0 entries"),
        (archive([]), "has 0 entries"),
        (archive([FIRST, Entry("m/data/0", DATA, at=0)]), "is not where the directory says"),
        (archive([FIRST, Entry("m/data/0", DATA, at=3)]), "is not where the directory says"),
        (archive([FIRST, Entry("m/data/0", DATA, at=2**31)]), "is cut short"),
        (archive([FIRST, Entry("m/data/0", DATA, local_name="m/data/1")]), "is not where the directory says"),
        (archive([FIRST, Entry("m/data/0", DATA, local_name="m/data/00")]), "is not where the directory says"),
        (archive([FIRST, Entry("m/data/0", DATA, nbytes=33)]), "reach beyond the place of its directory"),
        (archive([Entry("m/data.pkl", PICKLE, nbytes=len(PICKLE) + 1), INNER]), "its entries overlap"),
        (archive([FIRST, Entry("m/data/0", DATA, nbytes=2**32 - 1)]), "lacks a size of 64 bits"),
        (
            archive([FIRST, Entry("m/data/0", DATA, nbytes=2**32 - 1, extra=struct.pack("<2H2Q", 1, 16, 32, 33))]),
            "has two sizes",
        ),
        (
            archive([FIRST, Entry("m/data/0", DATA, nbytes=2**32 - 1, extra=struct.pack("<2H2q", 1, 16, -1, -1))]),
            "reach beyond the place",
        ),
        (
            archive([FIRST, Entry("m/data/0", DATA, at=2**32 - 1, extra=struct.pack("<2HQ", 1, 8, 2**64 - 1))]),
            "points beyond its end",
        ),
        (archive([FIRST, AROUND, Entry("m/data/0", DATA, at=WITHIN)]), "its entries overlap"),
        (archive([FIRST, INNER], start=0), "its directory is damaged"),
        (archive([FIRST, INNER], start=2**32 - 1), "its directory is not where it should be"),
        (archive([FIRST, INNER], count=3), "its directory is cut short"),
        (archive([FIRST, INNER], count=1), "has 1 entries|its data is not in the file"),
        (archive([FIRST, INNER])[:-22], "it has no directory at its end"),
        (archive([FIRST, INNER])[:-1], "it has no directory at its end"),
        (archive([FIRST, INNER]).replace(b"PK\x05\x06\0\0", b"PK\x05\x06\1\0"), "one of several parts"),
        (archive([FIRST, INNER, Entry("m/byteorder", b"big")]), "was written on a big-endian machine"),
        (archive([Entry("m/data.pkl", PICKLE + bytes(2**25)), INNER]), "its pickle has 33,554,5.. bytes"),
        (b"PK", "is cut short|no directory"),
    ],
    ids=range(32),
)  # fmt: skip
def test_archives_that_torch_does_not_write(tmp_path: Path, data: bytes, message: str) -> None:
    assert re.search(message, str(refusal(tmp_path, data)))


def test_an_archive_of_more_than_4_gib(tmp_path: Path) -> None:
    """Sizes and positions of 64 bits, in a file that is mostly a hole."""
    far, path = 5 << 30, tmp_path / "pytorch_model.bin"
    value = state(far=tensor(storage("1")), near=tensor(storage("0", n_items=far // 4), 3))
    entries = [(Entry("m/data.pkl", value), len(value)), (Entry("m/data/0", b""), far), (Entry("m/data/1", DATA), 32)]
    directory = b""
    with path.open("wb") as file:
        for entry, nbytes in entries:
            wide = struct.pack("<2H3Q", 1, 24, nbytes, nbytes, file.tell())
            file.write(local_header(entry) + entry.data)
            file.seek(nbytes - len(entry.data), 1)
            name = entry.name.encode()
            fields = (45, 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(name), len(wide), 0, 0, 0, 0, 2**32 - 1)
            directory += struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *fields) + name + wide
        start = file.tell()
        end = start + len(directory)
        file.write(directory + struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 3, 3, len(directory), start))
        file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0))
    a, b = read_torch_file(path)
    assert (a.name, b.name, a.offset > far, b.offset < 4096) == ("far", "near", True, True)
    with path.open("rb") as file:
        file.seek(a.offset)
        assert file.read(a.nbytes) == DATA


# The older form


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (legacy_form(PICKLE, {"0": (8, DATA)}, magic=program(number(1))), "not one that torch.save wrote"),
        (legacy_form(PICKLE, {"0": (8, DATA)}, magic=program(b"]")), "not one that torch.save wrote"),
        (legacy_form(PICKLE, {"0": (8, DATA)}, version=1002), "not one that torch.save wrote"),
        (legacy_form(PICKLE, {"0": (8, DATA)}, little=b"\x89"), "big-endian machine"),
        (legacy_form(PICKLE, {"0": (8, DATA)}, keys=b"N"), "does not list its storages"),
        (legacy_form(PICKLE, {"0": (8, DATA)}, keys=b"](Ne"), "holds one twice, or one that no tensor needs"),
        (legacy_form(PICKLE, {"0": (8, DATA)}, keys=b"]" * 99_999 + b"a" * 99_998), "holds one twice, or one"),
        (legacy_form(PICKLE, {"0": (8, DATA)}, keys=b"](" + text("1") + b"e"), "holds one twice, or one"),
        (legacy_form(PICKLE, {"0": (8, DATA)}, keys=b"](" + text("0") * 2 + b"e"), "holds one twice, or one"),
        (legacy_form(PICKLE, {}), "'a' in .* its data is not in the file"),
        (legacy_form(PICKLE, {"0": (7, DATA)}), "'0' is not of the size that its pickle says"),
        (legacy_form(PICKLE, {"0": (-1, DATA)}), "'0' is not of the size that its pickle says"),
        (legacy_form(PICKLE, {"0": (8, DATA[:-1])}), "is cut short"),
        (legacy_form(PICKLE, {"0": (8, DATA + b"\0")}), "is longer than its storages"),
        (legacy_form(PICKLE, {"0": (8, DATA)})[: -len(DATA) - 4], "not of the size"),
        (
            legacy_form(state(a=tensor(), b=tensor(storage(n_items=9))), {"0": (8, DATA)}),
            "its storage '0' is of two types or sizes",
        ),
        (
            legacy_form(state(a=tensor(), b=tensor(storage(kind="torch.IntStorage"))), {"0": (8, DATA)}),
            "its storage '0' is of two types or sizes",
        ),
    ],
    ids=range(17),
)
def test_the_older_form_at_odds_with_itself(tmp_path: Path, data: bytes, message: str) -> None:
    assert re.search(message, str(refusal(tmp_path, data)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no file of torch.save"),
        (b"hello, world", "no file of torch.save: it begins with b'hello, w'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_other_files(tmp_path: Path, data: bytes, message: str) -> None:
    assert message in str(refusal(tmp_path, data))


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        read_torch_file(tmp_path)


# Nothing but named errors, whatever the bytes


@pytest.mark.parametrize("form", VALID)
def test_every_cut(tmp_path: Path, form: str) -> None:
    for length in range(len(VALID[form])):
        refusal(tmp_path, VALID[form][:length])


@pytest.mark.parametrize("form", VALID)
@thorough
@given(data=st.data())
def test_any_change_of_bytes(tmp_path: Path, form: str, data: st.DataObject) -> None:
    changed = bytearray(VALID[form])
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(changed)))
        end = start + data.draw(st.integers(0, 8))
        changed[start:end] = data.draw(st.binary(max_size=8) | st.just(bytes(changed[start:end] * 2)))
    end_well_or_by_name(tmp_path, bytes(changed))


@thorough
@given(
    content=st.binary(max_size=64),
    head=st.sampled_from([b"", b"PK", b"\x80\x02", legacy_head(), legacy_head(little=b"}")]),
)
def test_any_file(tmp_path: Path, content: bytes, head: bytes) -> None:
    end_well_or_by_name(tmp_path, head + content)


# Whole checkpoints


def with_torch_files(folder: Path, *, legacy: bool = False, shards: int = 2) -> Path:
    """A tiny checkpoint, its shards as torch.save wrote them."""
    tiny_checkpoint(folder)
    for path in folder.glob("model*"):
        path.unlink()
    tensors = tiny_tensors(tiny_config())
    weight_map: dict[str, str] = {}
    for number_ in range(shards):
        part = dict(list(tensors.items())[number_::shards])
        name = f"pytorch_model-{number_ + 1:05}-of-{shards:05}.bin" if shards > 1 else "pytorch_model.bin"
        write_torch_file(folder / name, part, legacy=legacy)
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        write_json(folder / BIN_INDEX, {"weight_map": weight_map})
    return folder


@pytest.mark.parametrize(("legacy", "shards"), [(False, 1), (False, 2), (True, 2)])
def test_the_same_file_comes_of_both_formats(tmp_path: Path, legacy: bool, shards: int) -> None:
    outputs = []
    for parent, make in (
        ("a", tiny_checkpoint),
        ("b", functools.partial(with_torch_files, legacy=legacy, shards=shards)),
    ):
        output = tmp_path / f"{parent}.gguf"
        convert_checkpoint(make(tmp_path / parent / "tiny"), output, file_type("Q8_0"))
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1]


def test_matrices_that_lie_transposed(tmp_path: Path) -> None:
    outputs = []
    for parent, turned in (("a", False), ("b", True)):
        folder, output = tiny_checkpoint(tmp_path / parent / "tiny", shards=1), tmp_path / f"{parent}.gguf"
        (folder / "model.safetensors").unlink()
        tensors = tiny_tensors(tiny_config())
        if turned:
            tensors = {name: np.asfortranarray(array) for name, array in tensors.items()}
        write_torch_file(folder / "pytorch_model.bin", tensors)
        turned_found = [info for info in open_checkpoint(folder).tensors.values() if info.strides]
        assert bool(turned_found) is turned
        convert_checkpoint(folder, output, file_type("Q8_0"), check=False)
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1]


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    folder = with_torch_files(tmp_path / "tiny")
    write_shards(folder, tiny_tensors(tiny_config()), 1)
    assert {info.path.name for info in open_checkpoint(folder).tensors.values()} == {"model.safetensors"}


def test_the_index_of_torch_files_is_checked(tmp_path: Path) -> None:
    folder = with_torch_files(tmp_path / "tiny")
    edit_json(folder / BIN_INDEX, lambda index: index["weight_map"].update(ghost="pytorch_model-00001-of-00002.bin"))
    with pytest.raises(TensorError, match="'ghost' is named in the index"):
        open_checkpoint(folder)
    edit_json(folder / BIN_INDEX, lambda index: index["weight_map"].update(ghost="../../x.bin"))
    with pytest.raises(CheckpointError, match=f"{BIN_INDEX} names the shard .* not a plain file name"):
        open_checkpoint(folder)
    edit_json(folder / BIN_INDEX, lambda index: index["weight_map"].update(ghost="absent.bin"))
    with pytest.raises(CheckpointError, match=rf"absent\.bin is named in {BIN_INDEX}"):
        open_checkpoint(folder)


def test_buffers_that_the_model_does_not_need(tmp_path: Path) -> None:
    """Masks that old checkpoints carry along, of types that are not converted."""
    folder = with_torch_files(tmp_path / "tiny", shards=1)
    path = folder / "pytorch_model.bin"
    mask = tensor(storage("mask", "torch.BoolStorage", 16), 0, (4, 4), (4, 1))
    extra = Entry("model/data/mask", bytes(16))
    tensors = tiny_tensors(tiny_config())
    pickled = {"model.layers.0.self_attn.attention.bias": mask}
    storages = {}
    for key, (name, array) in enumerate(tensors.items()):
        where = storage(str(key), "torch.BFloat16Storage", array.size)
        pickled[name] = tensor(where, 0, array.shape, [stride // 2 for stride in array.strides])
        storages[str(key)] = array.tobytes()
    path.write_bytes(zip_form(state(**pickled), storages, extra))
    convert_checkpoint(folder, tmp_path / "x.gguf", file_type("Q8_0"), check=False)
