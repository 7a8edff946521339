"""What the pickle of a state dict may name, and what comes of it: values that have no power.

Sources: torch/serialization.py `persistent_id`, torch/_utils.py `_rebuild_*`, torch/_tensor.py `_reduce_ex_internal`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeGuard

MAX_DIMENSIONS = 8


class Applied(Enum):
    """The functions and classes that may be applied to arguments."""

    TENSOR = "torch._utils._rebuild_tensor"
    TENSOR_V2 = "torch._utils._rebuild_tensor_v2"
    TENSOR_V3 = "torch._utils._rebuild_tensor_v3"
    PARAMETER = "torch._utils._rebuild_parameter"
    ORDERED_DICT = "collections.OrderedDict"


@dataclass(frozen=True)
class StorageType:
    """A class of storages; one of dtype None counts bytes."""

    dtype: str | None


@dataclass(frozen=True)
class DtypeRef:
    dtype: str


Global = Applied | StorageType | DtypeRef

_STORAGES = {
    "BFloat16Storage": "BF16",
    "HalfStorage": "F16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
}
# Dtypes without a storage class of their own are stored as bytes, and named beside them (torch.storage._new_dtypes).
_DTYPES = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
}
GLOBALS: dict[str, Global] = {
    **{function.value: function for function in Applied},
    **{f"torch.{name}": StorageType(dtype) for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": StorageType(None),
    **{f"torch.{name}": DtypeRef(dtype) for name, dtype in _DTYPES.items()},
}
"""All that a pickle may name."""


@dataclass(frozen=True)
class StorageRef:
    """A run of `n_items` elements (bytes where `dtype` is None) that lies elsewhere in the file, under `key`."""

    key: str
    dtype: str | None
    n_items: int


@dataclass(frozen=True)
class TensorRef:
    """A view of a storage as its pickle has it: `offset` and `strides` in elements. Not yet checked against it."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class OrderedDictRef(dict[str, object]):
    """What `collections.OrderedDict` made: the one value that instructions may give attributes, which are dropped."""

    __slots__ = ()


def stored_under(persistent_id: object) -> StorageRef | None:
    """The storage that an id stands for; None if it is of anything else. The older form has one element more."""
    match persistent_id:
        case ("storage", StorageType(dtype), str(key), str(), n_items, *view) if _natural(n_items):
            return StorageRef(key, dtype, n_items) if view in ([], [None]) else None
    return None


def applied(function: Applied, arguments: object) -> TensorRef | OrderedDictRef | None:
    """What the function gives for the arguments; None if it does not take them."""
    match function, arguments:
        case Applied.ORDERED_DICT, ():
            return OrderedDictRef()
        case Applied.PARAMETER, (TensorRef() as tensor, bool(), dict()):
            return tensor
        case Applied.TENSOR, (StorageRef() as storage, offset, shape, strides):
            return _tensor(storage, storage.dtype, offset, shape, strides)
        case Applied.TENSOR_V2, (StorageRef() as storage, offset, shape, strides, bool(), dict(), *rest):
            return _tensor(storage, storage.dtype, offset, shape, strides) if _plain(rest) else None
        case (
            Applied.TENSOR_V3,
            (StorageRef(_, None, _) as storage, offset, shape, strides, bool(), dict(), DtypeRef(dtype), *rest),
        ):
            return _tensor(storage, dtype, offset, shape, strides) if _plain(rest) else None
    return None


def _tensor(
    storage: StorageRef, dtype: str | None, offset: object, shape: object, strides: object
) -> TensorRef | None:
    if dtype is None or not _natural(offset) or not _sizes(shape) or not _sizes(strides):
        return None
    return TensorRef(storage, dtype, offset, shape, strides) if len(shape) == len(strides) else None


def _natural(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**62


def _sizes(value: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and len(value) <= MAX_DIMENSIONS and all(map(_natural, value))


def _plain(metadata: list[object]) -> bool:
    """Whether the last argument, which marks tensors that are negated or conjugated on reading, is absent or empty."""
    return not metadata or (len(metadata) == 1 and (metadata[0] is None or metadata[0] == {}))
