"""File types, the tensor type of each tensor, and the encoding of rows: all three by llama.cpp itself."""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.file_types import FileType
from convert.releases import known_architectures, too_old
from models.errors import ConversionFailed, TensorError, UnsupportedError
from models.gguf_types import TENSOR_TYPES
from models.native import capture_log, cpu_model_params, library, run_interruptibly, shared_library
from models.text import printable

# Two log messages a tensor; the type after "->" is the new one, without an arrow the tensor stays as it is.
_DRY_RUN = re.compile(
    r"^\[ *\d+/ *\d+\] +(?P<name>\S+) +- \[[^]]*\], type = +(?P<old>\w+),\s+size = [^(\n]*(?:\((?P<new>\w+)\))?$",
    re.MULTILINE,
)
_NEEDS_MATRIX = "will require an imatrix"
_LOADING = re.compile(r"create_tensor: loading tensor (?P<name>\S+)")
_UNKNOWN = re.compile(r"unknown model architecture: '(?P<name>[^']+)'")
_MISSING = re.compile(r"tensor '(?P<name>[^']+)' not found")
_WRONG_SHAPE = re.compile(r"tensor '(?P<name>[^']+)' has wrong shape; expected (?P<expected>[^;]+?), got (?P<got>.*)")


@dataclass(frozen=True)
class TensorType:
    """A GGUF tensor type: `Q4_K` as against the file type `Q4_K_M`. A block is `block` weights in `nbytes`."""

    id: int
    name: str
    block: int
    nbytes: int

    def row_bytes(self, row_length: int) -> int:
        return row_length // self.block * self.nbytes

    def __reduce__(self) -> tuple[Callable[[str], TensorType], tuple[str]]:
        """There is one object of each, in another process too."""
        return tensor_type, (self.name,)


_BY_NAME = {name: TensorType(id, name, block, nbytes) for id, (name, block, nbytes) in TENSOR_TYPES.items()}
F32, F16, BF16 = _BY_NAME["F32"], _BY_NAME["F16"], _BY_NAME["BF16"]


def tensor_type(name: str) -> TensorType:
    """A tensor type by its name in any case."""
    return _BY_NAME[name.upper()]


@contextmanager
def hollow_file(header: bytes, data_bytes: int) -> Iterator[Path]:
    """A GGUF with a header and a hole where the tensor data would be: it takes no room, and is gone afterwards."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("handmill-header")
        try:
            with os.fdopen(fd, "wb", closefd=False) as file:
                file.write(header)
                file.truncate(len(header) + data_bytes)
            yield Path(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
        return
    with tempfile.TemporaryDirectory(prefix="handmill-") as folder:
        path = Path(folder) / "header.gguf"
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + data_bytes)
        yield path


def look_over(
    header: bytes, data_bytes: int, file_type: FileType, source_names: Mapping[str, str]
) -> dict[str, TensorType]:
    """`check_structure` and `choose_tensor_types` of a hollow file."""
    with hollow_file(header, data_bytes) as hollow:
        check_structure(hollow, source_names)
        return choose_tensor_types(hollow, file_type, len(source_names))


def choose_tensor_types(hollow: Path, file_type: FileType, n_tensors: int) -> dict[str, TensorType]:
    """GGUF tensor name -> type, in the order in which llama-quantize writes them, by its own dry run.

    Raises UnsupportedError for a file type that needs an importance matrix, ConversionFailed.
    """
    lib = library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = file_type.id
    params.dry_run = True
    source, output = os.fsencode(hollow), os.fsencode(os.devnull)
    with capture_log() as log:
        status = run_interruptibly(lambda: lib.llama_model_quantize(source, output, ctypes.byref(params)))
    if status != 0:
        raise ConversionFailed(
            f"llama.cpp cannot quantize this model to {file_type.name}: {'; '.join(log.problems())}",
            hint="Choose another --type.",
            file_type=file_type.name,
        )
    if any(_NEEDS_MATRIX in line for line in log.lines):
        raise UnsupportedError(
            f"{file_type.name} needs an importance matrix for this model, which handmill does not make",
            hint="Take a type that needs none: `handmill convert --type list` shows them.",
            file_type=file_type.name,
        )
    types = {m["name"]: tensor_type(m["new"] or m["old"]) for m in _DRY_RUN.finditer("\n".join(log.lines))}
    if len(types) != n_tensors:
        raise ConversionFailed(f"llama.cpp named the types of {len(types)} of {n_tensors} tensors")
    return types


def check_structure(hollow: Path, source_names: Mapping[str, str]) -> None:
    """Let llama.cpp look for every tensor that the architecture has, and hold its shape against the config.

    `source_names`: GGUF name -> name in the checkpoint. Raises TensorError, UnsupportedError, ConversionFailed.
    """
    lib = library()
    params = cpu_model_params()
    params.no_alloc = True
    params.load_mode = lib.LLAMA_LOAD_MODE_NONE  # llama.cpp wants it with no_alloc
    with capture_log() as log:
        model = run_interruptibly(lambda: lib.llama_model_load_from_file(os.fsencode(hollow), params))
    if model:
        lib.llama_model_free(model)
        return
    said = "; ".join(log.problems())
    if missing := _MISSING.search(said):
        name = missing["name"]
        raise TensorError(
            f"the source lacks a tensor of the model: {name}",
            hint="A shard is missing, or the config asks for more blocks than there are.",
            tensor=name,
        )
    if wrong := _WRONG_SHAPE.search(said):
        name = source_names.get(wrong["name"], wrong["name"])
        raise TensorError(
            f"tensor {printable(name)!r} does not have the shape that the model's config gives it: "
            f"it is [{_spaced(wrong['got'])}], the config makes it [{_spaced(wrong['expected'])}] (row length first)",
            hint="The config does not belong to these weights.",
            tensor=name,
        )
    if "wrong number of tensors" in said:
        asked_for = {m["name"] for line in log.lines if (m := _LOADING.match(line))}
        for name, source in source_names.items():
            if name not in asked_for:
                raise TensorError(
                    f"tensor {printable(source)!r} has no place in this model: llama.cpp does not read {name}",
                    hint="The weights are of a variant of this architecture.",
                    tensor=source,
                )
    if (unknown := _UNKNOWN.search(said)) and unknown["name"] in known_architectures():
        raise too_old("llama-cpp-python", unknown["name"])
    raise ConversionFailed(f"llama.cpp does not take this model: {said}")


def _spaced(shape: str) -> str:
    return ", ".join(re.findall(r"\d+", shape))


@cache
def _ggml() -> Any:
    lib = shared_library("ggml-base")
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
    lib.ggml_validate_row_data.restype = ctypes.c_bool
    for name in ("ggml_bf16_to_fp32_row", "ggml_fp16_to_fp32_row", "ggml_fp32_to_bf16_row", "ggml_fp32_to_fp16_row"):
        getattr(lib, name).argtypes = [pointer, pointer, size]
        getattr(lib, name).restype = None
    return lib


def decode_rows(raw: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Weights of a checkpoint (uint16 or uint32 bits of `dtype`) as float32, in the same shape."""
    if dtype == "F32":
        return raw.view(np.float32)
    values = np.empty(raw.shape, np.float32)
    convert = _ggml().ggml_bf16_to_fp32_row if dtype == "BF16" else _ggml().ggml_fp16_to_fp32_row
    convert(raw.ctypes.data, values.ctypes.data, raw.size)
    return values


class _TypeTraits(ctypes.Structure):
    """The beginning of `ggml_type_traits` in ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def decode_blocks(encoded: NDArray[np.uint8], kind: TensorType) -> NDArray[np.float32]:
    """What whole blocks of a quantized type stand for, one row after the other; only of a type that `is_decoded`."""
    values = np.empty(encoded.nbytes // kind.nbytes * kind.block, np.float32)
    _traits(kind).to_float(encoded.ctypes.data, values.ctypes.data, values.size)
    return values


def is_decoded(kind: TensorType) -> bool:
    """Whether llama.cpp has a way from a quantized type back to float32."""
    traits = _traits(kind)
    return bool(traits.is_quantized) and bool(traits.to_float)


@cache
def _traits(kind: TensorType) -> _TypeTraits:
    get = _ggml().ggml_get_type_traits
    get.argtypes, get.restype = [ctypes.c_int], ctypes.POINTER(_TypeTraits)
    traits: _TypeTraits = get(kind.id).contents
    return traits


def rounded_to(values: NDArray[np.float32], carrier: TensorType) -> NDArray[np.float32]:
    """`values` as they come back from F16 or BF16: llama.cpp's converter passes every tensor through one type."""
    if carrier is F32:
        return values
    bits = np.empty(values.shape, np.uint16)
    encode = _ggml().ggml_fp32_to_bf16_row if carrier is BF16 else _ggml().ggml_fp32_to_fp16_row
    encode(values.ctypes.data, bits.ctypes.data, values.size)
    return decode_rows(bits, carrier.name)


def encode_rows(values: NDArray[np.float32], kind: TensorType) -> NDArray[np.uint8]:
    """Rows [n_rows, row_length] in a tensor type. Any split of a tensor into rows gives the same bytes.

    The interpreter is free while llama.cpp encodes. Raises ConversionFailed where llama.cpp's own check of the
    encoded rows fails (a scale beyond the range of the type).
    """
    if kind is F32:
        return values.reshape(-1).view(np.uint8)
    n_rows, row_length = values.shape
    encoded = np.empty(n_rows * kind.row_bytes(row_length), np.uint8)
    ggml = _ggml()
    ggml.ggml_quantize_chunk(kind.id, values.ctypes.data, encoded.ctypes.data, 0, n_rows, row_length, None)
    if not are_valid_rows(encoded, kind):
        raise ConversionFailed(f"its values do not fit {kind.name}")
    return encoded


def are_valid_rows(encoded: NDArray[np.uint8], kind: TensorType) -> bool:
    """Whether rows pass llama.cpp's own check: no NaN or infinity among values and scales."""
    return bool(_ggml().ggml_validate_row_data(kind.id, encoded.ctypes.data, encoded.nbytes))


def prepare_encoder(kinds: Sequence[TensorType]) -> None:
    """Build the tables that some types look up, before threads do."""
    init = _ggml().ggml_quantize_init
    init.argtypes, init.restype = [ctypes.c_int], None
    for kind in kinds:
        init(kind.id)
