"""A Hugging Face checkpoint on disk: its JSON files, and its tensors by name.

Nothing is believed before it is checked: every header is validated against the size of its file, and no name out
of a checkpoint becomes a path. Weights are not read here; a `TensorInfo` says where they lie.
Formats: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, then the data), and
PyTorch's own (see torch_file.py), which is read where there are no safetensors.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from convert.tensor_info import DTYPE_BYTES
from convert.tensor_info import TensorInfo as TensorInfo  # what the rest of the package knows it by
from convert.torch_file import read_torch_file
from models.errors import CheckpointError, TensorError, UnsupportedError
from models.text import printable

# The reference implementation refuses longer headers; far above what 1,000 blocks need.
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 500_000_000

# The one place where a name out of a checkpoint becomes a path: no folders, and nothing that a terminal obeys.
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
"""The dtypes that are converted. Others are listed too: a model may not need the tensor; see tensors.py."""
MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Checkpoint:
    """A directory with `config.json` and shards, all headers checked."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """The first of `architectures`. Raises CheckpointError if the config names none."""
        names = self.config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise CheckpointError(
                f"{self.path / 'config.json'} names no architecture",
                hint='It should hold a line such as "architectures": ["LlamaForCausalLM"].',
                path=self.path,
            )
        return names[0]

    @cached_property
    def n_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the config and every shard's header. Raises CheckpointError, TensorError, UnsupportedError."""
    if not path.exists():
        raise CheckpointError(
            f"no such directory: {path}",
            hint="Give the folder of a checkpoint, or owner/name of a repository on the hub.",
            path=path,
        )
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a directory",
            hint="Give the folder that holds config.json and the shards.",
            path=path,
        )
    config = read_json(path / "config.json")
    if config is None:
        raise CheckpointError(
            f"{path} has no config.json",
            hint="Is this the folder of a Hugging Face checkpoint? It holds config.json beside the shards.",
            path=path,
        )
    tensors: dict[str, TensorInfo] = {}
    form = _format_of(path)
    index = _read_index(path / form.index)
    for shard in _shard_names(path, form, index):
        for tensor in form.read(path / shard):
            if tensor.name in tensors:
                raise TensorError(
                    f"tensor {tensor.name[:200]!r} is in {tensors[tensor.name].path.name} and in {shard}",
                    tensor=tensor.name,
                )
            tensors[tensor.name] = tensor
    if index is not None:
        _check_index(form.index, index, tensors)
    if not tensors:
        raise CheckpointError(f"the shards in {path} hold no tensors", path=path)
    return Checkpoint(path, config, tensors)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, or None if there is no such file. Raises CheckpointError."""
    text = read_text(path)
    if text is None:
        return None
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object", path=path)
    return value


def read_text(path: Path) -> str | None:
    """A UTF-8 file, or None if there is no such file. Raises CheckpointError."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise CheckpointError(f"{path} is not a file", path=path)
        if status.st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES:,} bytes", path=path)
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", path=path) from error


def parse_json(text: str | bytes, path: Path) -> Any:
    """Parse JSON out of `path`. Raises CheckpointError, also for depth and numbers made to break a parser."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        hint = "The file is damaged. Fetch it again."
        head = text[:40] if isinstance(text, str) else text[:40].decode("latin-1")
        if head.startswith("version https://git-lfs"):
            hint = "It is a Git LFS pointer: run `git lfs pull` in the checkpoint."
        raise CheckpointError(f"{path} is not JSON: {reason[:200]}", hint=hint, path=path) from error


@dataclass(frozen=True)
class _Format:
    """Names of an index and of shards without one, and what reads the tensors of a shard."""

    index: str
    shards: str
    read: Callable[[Path], list[TensorInfo]]


def _format_of(path: Path) -> _Format:
    """The format of the shards in the folder: safetensors if there are any."""
    for form in _FORMATS:
        if (path / form.index).exists() or any(entry.is_file() for entry in path.glob(form.shards)):
            return form
    others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in path.glob(pattern))
    wanted = " or ".join(form.shards for form in _FORMATS)
    if others:
        raise UnsupportedError(
            f"{path} holds {printable(others[0])} but no {wanted}",
            hint="Only those are converted; most repositories have them, some under another revision.",
            path=path,
        )
    raise CheckpointError(f"{path} has no {wanted}", hint="Are the shards fetched?", path=path)


def _read_index(index_path: Path) -> Mapping[str, str] | None:
    """`weight_map` of the index: tensor name -> shard file name, or None if the checkpoint has no index."""
    index = read_json(index_path)
    if index is None:
        return None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index_path} has no 'weight_map' from tensor names to shard files", path=index_path)
    for shard in sorted(set(weight_map.values())):
        if not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{index_path} names the shard {shard[:200]!r}, which is not a plain file name",
                hint="Do not use this checkpoint: its index points outside its own folder.",
                path=index_path,
            )
    return weight_map


def _shard_names(path: Path, form: _Format, index: Mapping[str, str] | None) -> list[str]:
    if index is None:
        return sorted(entry.name for entry in path.glob(form.shards) if entry.is_file())
    names = sorted(set(index.values()))
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{missing[0]} is named in {form.index} but is not in {path}",
            hint=f"{len(missing)} of {len(names)} shards are missing. Fetch the checkpoint again.",
            path=path / missing[0],
        )
    return names


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one shard, in the order of their data, checked against the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if size < 8:
                raise CheckpointError(
                    f"{path} has {size} bytes: no safetensors file", hint="Fetch it again.", path=path
                )
            if prefix == b"version ":
                raise CheckpointError(
                    f"{path} is a Git LFS pointer", hint="Run `git lfs pull` in the checkpoint.", path=path
                )
            if header_bytes > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: its header says {header_bytes:,} bytes, the file has {size:,}",
                    hint="It is cut short or not a safetensors file. Fetch it again.",
                    path=path,
                )
            header = parse_json(file.read(header_bytes), path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", path=path) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object", path=path)
    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    tensors = [_tensor_info(path, data_start, name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = data_start
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps the one before it" if tensor.offset < end else "leaves a hole before it"
            raise _broken(tensor.name, path, f"its data {what}")
        end += tensor.nbytes
    if end != size:
        what = "cut short" if end > size else "longer than its tensors"
        raise CheckpointError(
            f"{path} is {what}: its tensors end at byte {end:,}, the file has {size:,}",
            hint="Fetch it again.",
            path=path,
        )
    return tensors


def _tensor_info(path: Path, data_start: int, name: str, entry: object) -> TensorInfo:
    if not isinstance(entry, dict):
        raise _broken(name, path, "its header entry is not an object")
    dtype, shape, offsets = str(entry.get("dtype")), entry.get("shape"), entry.get("data_offsets")
    if dtype not in DTYPE_BYTES:
        raise UnsupportedError(
            f"tensor {name[:200]!r} in {path}: its dtype {dtype[:40]!r} is unknown",
            hint="Convert the original bf16, f16 or f32 checkpoint.",
            tensor=name,
        )
    if not _natural_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise _broken(name, path, f"its shape {printable(shape, 80)} is not a list of up to {MAX_DIMENSIONS} sizes")
    if not _natural_numbers(offsets) or len(offsets) != 2:
        raise _broken(name, path, f"its data_offsets {printable(offsets, 80)} are not two positions")
    nbytes = offsets[1] - offsets[0]
    if nbytes != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise _broken(name, path, f"its shape {shape} as {dtype} does not fit its {nbytes:,} bytes")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], nbytes)


def _natural_numbers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value)


def _broken(name: str, path: Path, reason: str) -> TensorError:
    return TensorError(f"tensor {name[:200]!r} in {path}: {reason}", hint="Fetch the shard again.", tensor=name)


def _check_index(index_name: str, index: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    for name, shard in index.items():
        if name not in tensors:
            raise TensorError(
                f"tensor {name[:200]!r} is named in the index but is not in {shard}",
                hint="The shard belongs to another checkpoint, or is cut. Fetch it again.",
                tensor=name,
            )
    for name, tensor in tensors.items():
        if name not in index:
            raise TensorError(
                f"tensor {name[:200]!r} in {tensor.path.name} is not in the index",
                hint=f"The shard and {index_name} do not belong together.",
                tensor=name,
            )


_FORMATS = (
    _Format("model.safetensors.index.json", "model*.safetensors", read_header),
    _Format("pytorch_model.bin.index.json", "pytorch_model*.bin", read_torch_file),
)
