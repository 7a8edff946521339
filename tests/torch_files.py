"""Files as torch.save writes them, by hand: pickles instruction by instruction, archives header by header.

And what is asked of every file of that sort: the elements of its tensors, and a named error if it is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

from convert.tensor_info import TensorInfo
from convert.torch_file import read_torch_file
from models.errors import CheckpointError
from tests.checkpoints import message_of, quick

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
TENSOR = "torch._utils._rebuild_tensor_v2"
_STORAGES = {np.dtype(np.uint16): "BFloat16", np.dtype(np.float16): "Half", np.dtype(np.float32): "Float"}
_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "BOOL": "?", "F8_E4M3": "u1", "F8_E5M2": "u1"}

EIGHT = np.arange(8, dtype=np.float32)
DATA = EIGHT.tobytes()
"""What the storages of the tests hold if nothing else is said."""

# Pickles: each function gives the instructions that leave one value on the stack


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def row(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def sizes(values: Sequence[int]) -> bytes:
    return row(*map(number, values))


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def applied(name: str, *arguments: bytes) -> bytes:
    return named(name) + row(*arguments) + b"R"


def storage(key: str = "0", kind: str = "torch.FloatStorage", n_items: int = 8, *more: bytes) -> bytes:
    return row(text("storage"), named(kind), text(key), text("cpu"), number(n_items), *more) + b"Q"


def hooks() -> bytes:
    return applied("collections.OrderedDict")


def tensor(
    where: bytes | None = None, offset: int = 0, shape: Sequence[int] = (2, 4), strides: Sequence[int] = (4, 1)
) -> bytes:
    where = storage() if where is None else where
    return applied(TENSOR, where, number(offset), sizes(shape), sizes(strides), b"\x89", hooks())


def mapping(values: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def program(*instructions: bytes) -> bytes:
    return b"\x80\x02" + b"".join(instructions) + b"."


def state(**tensors: bytes) -> bytes:
    return program(mapping(tensors))


def views(*more: bytes) -> bytes:
    """Many views of one storage."""
    where = storage("0", "torch.FloatStorage", 8, *more)
    return state(
        whole=tensor(where),
        tied=tensor(where),
        transposed=tensor(where, 0, (4, 2), (1, 4)),
        tail=tensor(where, 5, (3,), (1,)),
        column=tensor(where, 1, (2, 1), (4, 7)),
        scalar=tensor(where, 7, (), ()),
        empty=tensor(where, 0, (0, 4), (4, 1)),
        plain=applied("torch._utils._rebuild_tensor", where, number(2), sizes((2,)), sizes((3,))),
        parameter=applied("torch._utils._rebuild_parameter", tensor(where, 4, (4,), (1,)), b"\x88", hooks()),
    )


# Archives


@dataclass
class Entry:
    """A file in an archive. `at` is where the directory says that it lies, if not where it does."""

    name: str
    data: bytes
    method: int = 0
    flags: int = 0
    at: int | None = None
    nbytes: int | None = None
    local_name: str | None = None
    extra: bytes = b""


def local_header(entry: Entry) -> bytes:
    name = (entry.name if entry.local_name is None else entry.local_name).encode()
    return struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, entry.method, 0, 0, 0, 0, 0, len(name), 0) + name


def archive(entries: Sequence[Entry], *, start: int | None = None, count: int | None = None) -> bytes:
    """A zip archive; `start` and `count` stand in its end in place of the true ones of the directory."""
    data, directory = b"", b""
    for entry in entries:
        at = len(data) if entry.at is None else entry.at
        data += local_header(entry) + entry.data
        nbytes = len(entry.data) if entry.nbytes is None else entry.nbytes
        name = entry.name.encode()
        fields = (20, 20, entry.flags, entry.method, 0, 0, 0, nbytes, nbytes, len(name), len(entry.extra), 0, 0, 0, 0)
        directory += struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *fields, at) + name + entry.extra
    n = len(entries) if count is None else count
    end = (b"PK\x05\x06", 0, 0, n, n, len(directory), len(data) if start is None else start, 0)
    return data + directory + struct.pack("<4s4H2LH", *end)


def zip_form(pickle: bytes, storages: Mapping[str, bytes], *more: Entry, prefix: str = "model") -> bytes:
    entries = [Entry(f"{prefix}/data.pkl", pickle), Entry(f"{prefix}/version", b"3\n")]
    entries += [Entry(f"{prefix}/data/{key}", data) for key, data in storages.items()]
    return archive([*entries, *more])


def legacy_head(magic: bytes = MAGIC, version: int = 1001, little: bytes = b"\x88") -> bytes:
    return magic + program(number(version)) + program(mapping({"little_endian": little}))


def legacy_form(
    pickle: bytes,
    storages: Mapping[str, tuple[int, bytes]],
    *,
    magic: bytes = MAGIC,
    version: int = 1001,
    little: bytes = b"\x88",
    keys: bytes | None = None,
) -> bytes:
    """The older form; `storages` are numbers of elements and bytes, by key."""
    listed = b"](" + b"".join(map(text, storages)) + b"e" if keys is None else keys
    head = legacy_head(magic, version, little) + pickle + program(listed)
    return head + b"".join(struct.pack("<q", n) + data for n, data in storages.values())


def write_torch_file(path: Path, tensors: Mapping[str, NDArray[Any]], *, legacy: bool = False) -> None:
    """A state dict of arrays, each a storage of its own; uint16 are the bits of BF16, as in tests/checkpoints.py."""
    pickled, storages = {}, {}
    for key, (name, array) in enumerate(tensors.items()):
        strides = [stride // array.itemsize for stride in array.strides]
        where = storage(str(key), f"torch.{_STORAGES[array.dtype]}Storage", array.size, *([b"N"] if legacy else []))
        pickled[name] = tensor(where, 0, array.shape, strides)
        storages[str(key)] = (array.size, array.tobytes("A"))
    if legacy:
        path.write_bytes(legacy_form(state(**pickled), storages))
    else:
        path.write_bytes(zip_form(state(**pickled), {key: data for key, (_, data) in storages.items()}))


VALID = {"zip": zip_form(views(), {"0": DATA}), "legacy": legacy_form(views(b"N"), {"0": (8, DATA)})}

# Reading


def values(info: TensorInfo) -> NDArray[Any]:
    """The elements of a tensor, through its strides; the bits of those that numpy has no type for."""
    dtype = np.dtype(_NUMPY.get(info.dtype) or f"<{info.dtype[0].lower()}{int(info.dtype[1:]) // 8}")
    assert info.nbytes == int(np.prod(info.shape)) * dtype.itemsize
    data = np.frombuffer(info.path.read_bytes()[info.offset :].ljust(8, b"\0"), np.uint8)
    flat = data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)
    if info.strides is None:
        return flat[: int(np.prod(info.shape))].reshape(info.shape)
    return np.lib.stride_tricks.as_strided(flat, info.shape, [stride * dtype.itemsize for stride in info.strides])


def written(folder: Path, data: bytes) -> Path:
    path = folder / "pytorch_model.bin"
    path.write_bytes(data)
    return path


def read(folder: Path, data: bytes) -> dict[str, TensorInfo]:
    return {info.name: info for info in read_torch_file(written(folder, data))}


def refusal(folder: Path, data: bytes) -> CheckpointError:
    """The error that a file ends with, fit to be shown."""
    with pytest.raises(CheckpointError) as raised:
        read(folder, data)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000
    assert raised.value.hint
    return raised.value


def end_well_or_by_name(tmp_path: Path, data: bytes) -> None:
    """Read; what is found lies within the file, whatever it is."""
    path = written(tmp_path, data)

    def check() -> None:
        for info in read_torch_file(path):
            strides = info.strides or (0,) * len(info.shape)
            last = sum((size - 1) * stride for size, stride in zip(info.shape, strides, strict=True))
            item = info.nbytes // max(1, int(np.prod(info.shape, dtype=object)))
            assert 0 <= info.offset <= info.offset + max(info.nbytes, 0) <= len(data)
            assert not info.nbytes or info.offset + (last + 1) * item <= len(data)

    assert message_of(check).isprintable()


thorough = settings(quick, max_examples=200)
