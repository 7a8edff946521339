"""The pickles of PyTorch's files, read as data. Nothing is imported, looked up or called.

A pickle is a program for a small stack machine. Most of its instructions only make numbers, texts and containers; the
ones that reach further name a global and apply it to arguments. Here a global is a plain value (see torch_globals.py)
or refused by name, and applying one gives numbers that say where a tensor lies. Instructions that state dicts do not
hold are refused, too.

Time and memory are bounded by the number of instructions and by the bytes read. No value is walked in depth: a deep or
shared structure costs what its instructions cost.

Source: CPython's pickletools.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from convert.torch_globals import GLOBALS, Applied, OrderedDictRef, TensorRef, applied, stored_under
from models.errors import CheckpointError, UnsupportedError
from models.text import printable

MAX_BYTES = 32 << 20
MAX_INSTRUCTIONS = 4_000_000
"""A tensor takes 40 to 50 instructions and some 200 bytes."""
MAX_MEMO = 1 << 20
MAX_DEPTH = 100_000
MAX_TENSORS = 65_536
_MAX_LINE = 200
_MAX_INTEGER_BYTES = 16
_HIGHEST_PROTOCOL = 5


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
        storage = stored_under(self.pop())
        if storage is None:
            raise self.refused("a persistent id that is not of a storage")
        self.push(storage)

    def apply(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Applied):
            raise self.refused(f"the application of {_kind(function)}")
        made = applied(function, arguments)
        if made is None:
            raise self.refused(f"arguments that {function.value} does not take")
        self._tensors_left -= isinstance(made, TensorRef)
        if self._tensors_left < 0:
            raise self.broken(f"it has more than {MAX_TENSORS:,} tensors")
        self.push(made)

    def build(self) -> None:
        """Attributes of an object. A state dict has `_metadata`, versions of its modules, which no weight needs."""
        state = self.pop()
        if not isinstance(state, dict) or not self._stack or not isinstance(self._stack[-1], OrderedDictRef):
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
