"""The pickles of PyTorch's files, read as data. Nothing is imported, looked up or called.

A pickle is a program for a small stack machine. Most of its instructions only make numbers, texts and containers; the
ones that reach further name a global and apply it to arguments. Here a global is a plain value, known from the tables
below or refused by name, and applying one gives a `TensorRef`: numbers that say where a tensor lies. Instructions that
state dicts do not hold are refused, too.

Time and memory are bounded by the number of instructions and by the bytes read. No value is walked in depth: a deep or
shared structure costs what its instructions cost.

Sources: CPython's pickletools.py for the instructions; torch's serialization.py and _utils.py for what is stored.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import BinaryIO, TypeGuard

from models.errors import CheckpointError, UnsupportedError
from models.text import printable

MAX_BYTES = 32 << 20
MAX_INSTRUCTIONS = 4_000_000
"""A tensor takes 40 to 50 instructions and some 200 bytes."""
MAX_MEMO = 1 << 20
MAX_DEPTH = 100_000
MAX_TENSORS = 65_536
MAX_DIMENSIONS = 8
_MAX_LINE = 200
_MAX_INTEGER_BYTES = 16
_HIGHEST_PROTOCOL = 5


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


class _OrderedDict(dict[str, object]):
    """What `collections.OrderedDict` made: the one value that instructions may give attributes, which are dropped."""

    __slots__ = ()


_MARK = object()


def read_pickle(file: BinaryIO, path: Path) -> object:
    """The value of the pickle that begins at the file's position, and no byte more than it is read.

    Made of None, bool, int, float, str, bytes, list, tuple, dict with keys of text, StorageRef, TensorRef and Global.
    `path` is for messages. Raises UnsupportedError for what it refuses by name, CheckpointError for what is broken.
    """
    return _Machine(file, path).run()


class _Machine:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._bytes_left = MAX_BYTES
        self._tensors_left = MAX_TENSORS
        self._stack: list[object] = []
        self._memo: dict[int, object] = {}

    def run(self) -> object:
        for _ in range(MAX_INSTRUCTIONS):
            code = self.read(1)[0]
            if code == _STOP:
                break
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise self.refused(f"the instruction {_REFUSED.get(code, hex(code))}")
            instruction(self)
            if len(self._stack) > MAX_DEPTH:
                raise self.broken(f"its stack grows beyond {MAX_DEPTH:,} values")
        else:
            raise self.broken(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
        value = self.pop()
        if self._stack:
            raise self.broken("it leaves values behind")
        return value

    # What the instructions read

    def read(self, n: int) -> bytes:
        self._bytes_left -= n
        if self._bytes_left < 0:
            raise self.broken(f"it takes more than {MAX_BYTES:,} bytes")
        data = self._file.read(n)
        if len(data) != n:
            raise self.broken("it is cut short")
        return data

    def unsigned(self, n: int) -> int:
        return int.from_bytes(self.read(n), "little")

    def signed(self, n: int) -> int:
        return int.from_bytes(self.read(n), "little", signed=True)

    def integer(self, length: int) -> int:
        if length > _MAX_INTEGER_BYTES:
            raise self.broken(f"it holds an integer of {length:,} bytes")
        return self.signed(length)

    def text(self, length: int) -> str:
        try:
            return self.read(length).decode()
        except UnicodeDecodeError as error:
            raise self.broken("a text in it is not UTF-8") from error

    def line(self) -> str:
        line = self._file.readline(_MAX_LINE + 1)
        self._bytes_left -= len(line)
        if not line.endswith(b"\n"):
            raise self.broken("the name of a global in it does not end")
        return line[:-1].decode("utf-8", "replace")

    # What they do to the stack

    def push(self, value: object) -> None:
        self._stack.append(value)

    def push_tuple(self, n: int) -> None:
        self.push(tuple([self.pop() for _ in range(n)][::-1]))

    def pop(self) -> object:
        if not self._stack or self._stack[-1] is _MARK:
            raise self.broken("it takes a value where there is none")
        return self._stack.pop()

    def pop_to_mark(self) -> list[object]:
        for i in range(len(self._stack) - 1, -1, -1):
            if self._stack[i] is _MARK:
                values = self._stack[i + 1 :]
                del self._stack[i:]
                return values
        raise self.broken("it lacks a mark")

    def extend(self, values: list[object]) -> None:
        target = self._stack[-1] if self._stack else None
        if not isinstance(target, list):
            raise self.broken("it extends a list where there is none")
        target.extend(values)

    def set_items(self, values: list[object]) -> None:
        target = self._stack[-1] if self._stack else None
        if not isinstance(target, dict) or len(values) % 2:
            raise self.broken("it sets an item of a dict where there is none")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str):  # integers, for one, can be chosen so that a dict of them takes for ever
                raise self.refused(f"a key that is no text but {_kind(key)}")
            if key in target:
                raise self.broken(f"it has the key {printable(key, 80)!r} twice")
            target[key] = value

    def put(self, index: int | None) -> None:
        """Remember the topmost value, which stays, as `index`; the next free one if None."""
        index = len(self._memo) if index is None else index
        if index >= MAX_MEMO:
            raise self.broken(f"it remembers more than {MAX_MEMO:,} values")
        self.push(self.pop())
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise self.broken("it recalls a value that it did not remember")
        self.push(self._memo[index])

    # What reaches further in a pickle, and does not here

    def push_global(self, module: object, name: object) -> None:
        if not isinstance(name, str) or not isinstance(module, str):
            raise self.broken("it names a global by what is no text")
        found = GLOBALS.get(f"{module}.{name}")
        if found is None:
            raise self.refused(f"the global {printable(f'{module}.{name}', 120)!r}")
        self.push(found)

    def persistent(self) -> None:
        match self.pop():
            case ("storage", StorageType(dtype), str(key), str(), n_items) | (
                "storage", StorageType(dtype), str(key), str(), n_items, None,
            ) if _natural(n_items):  # fmt: skip
                self.push(StorageRef(key, dtype, n_items))
            case _:
                raise self.refused("a persistent id that is not of a storage")

    def apply(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Applied):
            raise self.refused(f"the application of {_kind(function)}")
        made = self._applied(function, arguments)
        if made is None:
            raise self.refused(f"arguments that {function.value} does not take")
        self.push(made)

    def _applied(self, function: Applied, arguments: object) -> object | None:
        match function, arguments:
            case Applied.ORDERED_DICT, ():
                return _OrderedDict()
            case Applied.PARAMETER, (TensorRef() as tensor, bool(), dict()):
                return tensor
            case Applied.TENSOR, (StorageRef() as storage, offset, shape, strides):
                return self._tensor(storage, storage.dtype, offset, shape, strides)
            case Applied.TENSOR_V2, (StorageRef() as storage, offset, shape, strides, bool(), dict(), *rest):
                return self._tensor(storage, storage.dtype, offset, shape, strides) if _plain(rest) else None
            case (
                Applied.TENSOR_V3,
                (StorageRef(_, None, _) as storage, offset, shape, strides, bool(), dict(), DtypeRef(dtype), *rest),
            ):
                return self._tensor(storage, dtype, offset, shape, strides) if _plain(rest) else None
        return None

    def _tensor(
        self, storage: StorageRef, dtype: str | None, offset: object, shape: object, strides: object
    ) -> TensorRef | None:
        self._tensors_left -= 1
        if self._tensors_left < 0:
            raise self.broken(f"it has more than {MAX_TENSORS:,} tensors")
        if dtype is None or not _natural(offset) or not _sizes(shape) or not _sizes(strides):
            return None
        if len(shape) != len(strides):
            return None
        return TensorRef(storage, dtype, offset, shape, strides)

    def build(self) -> None:
        """Attributes of an object. A state dict has `_metadata`, versions of its modules, which no weight needs."""
        state = self.pop()
        if not isinstance(state, dict) or not self._stack or not isinstance(self._stack[-1], _OrderedDict):
            raise self.refused("attributes of what is no OrderedDict")

    # Errors

    def broken(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"the pickle in {self._path} cannot be read: {reason}",
            hint="The file is damaged, or made to break programs. Fetch it again, from where you trust.",
            path=self._path,
        )

    def refused(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"the pickle in {self._path} holds {what}, which plain tensors do not need",
            hint="No code in it was run. Take the repository's safetensors, or save its state dict alone.",
            path=self._path,
        )


def _natural(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**62


def _sizes(value: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and len(value) <= MAX_DIMENSIONS and all(map(_natural, value))


def _plain(metadata: list[object]) -> bool:
    """Whether the last argument, which marks tensors that are negated or conjugated on reading, is absent or empty."""
    return not metadata or (len(metadata) == 1 and (metadata[0] is None or metadata[0] == {}))


def _kind(value: object) -> str:
    return value.value if isinstance(value, Applied) else f"a value of type {type(value).__name__}"


# The instructions, by the names that pickletools.py gives them


def _proto(machine: _Machine) -> None:
    version = machine.unsigned(1)
    if version > _HIGHEST_PROTOCOL:
        raise machine.refused(f"protocol {version}")


def _frame(machine: _Machine) -> None:
    machine.read(8)


def _binfloat(machine: _Machine) -> None:
    machine.push(struct.unpack(">d", machine.read(8))[0])


def _append(machine: _Machine) -> None:
    value = machine.pop()
    machine.extend([value])


def _setitem(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.push_global(module, name)


_STOP = ord(".")
_INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: _proto,  # PROTO
    0x95: _frame,  # FRAME
    ord("("): lambda m: m.push(_MARK),  # MARK
    ord("N"): lambda m: m.push(None),  # NONE
    0x88: lambda m: m.push(True),  # NEWTRUE
    0x89: lambda m: m.push(False),  # NEWFALSE
    ord("J"): lambda m: m.push(m.signed(4)),  # BININT
    ord("K"): lambda m: m.push(m.unsigned(1)),  # BININT1
    ord("M"): lambda m: m.push(m.unsigned(2)),  # BININT2
    0x8A: lambda m: m.push(m.integer(m.unsigned(1))),  # LONG1
    0x8B: lambda m: m.push(m.integer(m.unsigned(4))),  # LONG4
    ord("G"): _binfloat,  # BINFLOAT
    ord("X"): lambda m: m.push(m.text(m.unsigned(4))),  # BINUNICODE
    0x8C: lambda m: m.push(m.text(m.unsigned(1))),  # SHORT_BINUNICODE
    0x8D: lambda m: m.push(m.text(m.unsigned(8))),  # BINUNICODE8
    ord("B"): lambda m: m.push(m.read(m.unsigned(4))),  # BINBYTES
    ord("C"): lambda m: m.push(m.read(m.unsigned(1))),  # SHORT_BINBYTES
    0x8E: lambda m: m.push(m.read(m.unsigned(8))),  # BINBYTES8
    ord("]"): lambda m: m.push([]),  # EMPTY_LIST
    ord("a"): _append,  # APPEND
    ord("e"): lambda m: m.extend(m.pop_to_mark()),  # APPENDS
    ord(")"): lambda m: m.push(()),  # EMPTY_TUPLE
    ord("t"): lambda m: m.push(tuple(m.pop_to_mark())),  # TUPLE
    0x85: lambda m: m.push_tuple(1),  # TUPLE1
    0x86: lambda m: m.push_tuple(2),  # TUPLE2
    0x87: lambda m: m.push_tuple(3),  # TUPLE3
    ord("}"): lambda m: m.push({}),  # EMPTY_DICT
    ord("s"): _setitem,  # SETITEM
    ord("u"): lambda m: m.set_items(m.pop_to_mark()),  # SETITEMS
    ord("q"): lambda m: m.put(m.unsigned(1)),  # BINPUT
    ord("r"): lambda m: m.put(m.unsigned(4)),  # LONG_BINPUT
    0x94: lambda m: m.put(None),  # MEMOIZE
    ord("h"): lambda m: m.get(m.unsigned(1)),  # BINGET
    ord("j"): lambda m: m.get(m.unsigned(4)),  # LONG_BINGET
    ord("c"): lambda m: m.push_global(m.line(), m.line()),  # GLOBAL
    0x93: _stack_global,  # STACK_GLOBAL
    ord("Q"): lambda m: m.persistent(),  # BINPERSID
    ord("R"): lambda m: m.apply(),  # REDUCE
    ord("b"): lambda m: m.build(),  # BUILD
}
# The refused ones that have a name worth saying: they make objects of any class.
_REFUSED = {
    ord("i"): "INST",
    ord("o"): "OBJ",
    0x81: "NEWOBJ",
    0x92: "NEWOBJ_EX",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
}
