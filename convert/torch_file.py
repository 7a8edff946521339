"""The tensors of a file that torch.save wrote, in either of its forms. No torch, and no code of the file, is run.

Since PyTorch 1.6 it is a zip archive: `NAME/data.pkl`, the pickle of the state dict, and `NAME/data/KEY`, the bytes of
each storage. Before, it was a row of pickles (a magic number, a version, the writer's machine, the state dict, the
keys of the storages), then the storages in the order of the keys, each after its number of elements in 8 bytes.
Source: torch/serialization.py, `_save` and `_legacy_save`.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from convert.tensor_info import DTYPE_BYTES, TensorInfo, contiguous
from convert.torch_globals import StorageRef, TensorRef
from convert.torch_pickle import MAX_BYTES, read_pickle
from convert.torch_zip import ZipEntry, zip_entries
from models.errors import CheckpointError, TensorError, UnsupportedError
from models.text import printable

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001


_Places = dict[str, tuple[int, int]]
"""The storages by key: where the bytes of each begin, and how many they are."""


def read_torch_file(path: Path) -> list[TensorInfo]:
    """The tensors of a state dict, in its order; of any dtype in DTYPE_BYTES, also without elements or dimensions.

    Tied tensors lie in the same place. Raises CheckpointError, TensorError, and UnsupportedError for all that a state
    dict of plain tensors does not hold, by name.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
            file.seek(0)
            if head.startswith(b"PK"):
                state, places = _read_zip(file, path)
            elif head.startswith(b"\x80"):
                state, places = _read_legacy(file, path)
            elif head == b"version ":
                raise CheckpointError(
                    f"{path} is a Git LFS pointer", hint="Run `git lfs pull` in the checkpoint.", path=path
                )
            else:
                raise CheckpointError(
                    f"{path} is no file of torch.save: it begins with {head!r}", hint="Fetch it again.", path=path
                )
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", path=path) from error
    return [_tensor_info(path, name, tensor, places) for name, tensor in state.items()]


# The two forms


def _read_zip(file: BinaryIO, path: Path) -> tuple[dict[str, TensorRef], _Places]:
    entries = zip_entries(file, path)
    pickles = [name for name in entries if name.endswith(b"/data.pkl") and name.count(b"/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(
            f"the archive {path} has {len(pickles)} entries 'NAME/data.pkl' instead of one",
            hint="It is no state dict that torch.save wrote.",
            path=path,
        )
    prefix = pickles[0].removesuffix(b"data.pkl")
    order = entries.get(prefix + b"byteorder")
    if order is not None and _bytes_of(file, order, path) != b"little":
        raise _other_byte_order(path)
    state = _state_dict(read_pickle(io.BytesIO(_bytes_of(file, entries[pickles[0]], path)), path), path)
    places: _Places = {}
    for tensor in state.values():
        key = tensor.storage.key
        entry = entries.get(prefix + b"data/" + key.encode())
        if entry is not None:
            places[key] = (entry.offset, entry.nbytes)
    return state, places


def _bytes_of(file: BinaryIO, entry: ZipEntry, path: Path) -> bytes:
    if entry.nbytes > MAX_BYTES:
        raise _broken(path, f"its pickle has {entry.nbytes:,} bytes, more than {MAX_BYTES:,}")
    file.seek(entry.offset)
    return file.read(entry.nbytes)


def _read_legacy(file: BinaryIO, path: Path) -> tuple[dict[str, TensorRef], _Places]:
    magic, version = read_pickle(file, path), read_pickle(file, path)
    if magic != _MAGIC or version != _VERSION:
        raise UnsupportedError(
            f"{path} is a pickle, but not one that torch.save wrote",
            hint="Pickles of other programs are not read. Fetch the repository's safetensors.",
            path=path,
        )
    machine = read_pickle(file, path)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise _other_byte_order(path)
    state = _state_dict(read_pickle(file, path), path)
    return state, _legacy_places(file, path, read_pickle(file, path), state)


def _legacy_places(file: BinaryIO, path: Path, keys: object, state: Mapping[str, TensorRef]) -> _Places:
    """The storages in the order of `keys`, from the file's position to its end."""
    storages: dict[str, StorageRef] = {}
    for tensor in state.values():
        if storages.setdefault(tensor.storage.key, tensor.storage) != tensor.storage:
            raise _broken(path, f"its storage {printable(tensor.storage.key)!r} is of two types or sizes")
    if not isinstance(keys, list):
        raise _broken(path, "it does not list its storages")
    places: _Places = {}
    at, size = file.tell(), os.fstat(file.fileno()).st_size
    for key in keys:
        if not isinstance(key, str) or key not in storages or key in places:
            raise _broken(path, "its list of storages holds one twice, or one that no tensor needs")
        file.seek(at)
        if file.read(8) != storages[key].n_items.to_bytes(8, "little"):
            raise _broken(path, f"its storage {printable(key)!r} is not of the size that its pickle says")
        places[key] = (at + 8, _storage_bytes(storages[key]))
        at += 8 + _storage_bytes(storages[key])
        if at > size:
            raise _broken(path, f"it is cut short: {at:,} bytes are needed, it has {size:,}")
    if at != size:
        raise _broken(path, f"it is longer than its storages: they end at byte {at:,}, it has {size:,}")
    return places


def _state_dict(value: object, path: Path) -> dict[str, TensorRef]:
    """The value, if it is a dict of tensors and of nothing else."""
    if not isinstance(value, dict):
        raise UnsupportedError(
            f"{path} holds {_kind(value)} where a dict of tensors should be",
            hint="Only the state dict of a model is read, saved alone.",
            path=path,
        )
    for name, tensor in value.items():
        if not isinstance(tensor, TensorRef):
            raise UnsupportedError(
                f"{path} holds {_kind(tensor)} under {printable(name)!r}, where a tensor should be",
                hint="It is no plain state dict; perhaps a training checkpoint that holds one. Save that one alone.",
                path=path,
            )
    return value


def _tensor_info(path: Path, name: str, tensor: TensorRef, places: _Places) -> TensorInfo:
    """Where the tensor lies, after every number of it is checked against its storage, and that against the file."""
    storage, shape, item = tensor.storage, tensor.shape, DTYPE_BYTES[tensor.dtype]
    if storage.key not in places:
        raise _bad_tensor(name, path, "its data is not in the file")
    start, there = places[storage.key]
    room = _storage_bytes(storage)
    if room > there:
        raise _bad_tensor(name, path, f"its storage should have {room:,} bytes, and has {there:,}")
    n_items = math.prod(shape)
    steps = sum((size - 1) * stride for size, stride in zip(shape, tensor.strides, strict=True))
    end = tensor.offset + (steps + 1 if n_items else 0)
    if max(end, n_items) * item > room:
        raise _bad_tensor(
            name, path, f"its shape {shape} as {tensor.dtype} does not fit its storage of {room:,} bytes"
        )
    strides = None if contiguous(shape, tensor.strides) else tensor.strides
    return TensorInfo(name, tensor.dtype, shape, path, start + tensor.offset * item, n_items * item, strides)


def _kind(value: object) -> str:
    return "a dict" if isinstance(value, dict) else f"a value of type {type(value).__name__}"


def _storage_bytes(storage: StorageRef) -> int:
    return storage.n_items * (1 if storage.dtype is None else DTYPE_BYTES[storage.dtype])


# Errors


def _bad_tensor(name: str, path: Path, reason: str) -> TensorError:
    return TensorError(f"tensor {printable(name)!r} in {path}: {reason}", hint="Fetch the shard again.", tensor=name)


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {reason}", hint="It is damaged. Fetch it again.", path=path)


def _other_byte_order(path: Path) -> UnsupportedError:
    return UnsupportedError(
        f"{path} was written on a big-endian machine", hint="Save it again on a little-endian one.", path=path
    )
