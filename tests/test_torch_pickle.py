"""Pickles as data: what runs code elsewhere, what makes no sense, what grows without end."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import subprocess
import sys
import time
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.torch_globals import GLOBALS
from tests.torch_files import (
    DATA,
    TENSOR,
    applied,
    end_well_or_by_name,
    hooks,
    legacy_head,
    mapping,
    named,
    number,
    program,
    read,
    refusal,
    row,
    sizes,
    state,
    storage,
    tensor,
    text,
    thorough,
    values,
    zip_form,
)


def refused_pickle(tmp_path: Path, data: bytes) -> str:
    """What is said of a pickle, the same in either form."""
    messages = {str(refusal(tmp_path, form)) for form in (zip_form(data, {}), legacy_head() + data)}
    assert len(messages) == 1
    return messages.pop()


# What is meant well


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    """A state dict by CPython's own pickler, for which two modules of torch stand in."""
    stand_in = types.ModuleType("torch")
    for name in (TENSOR, "torch.FloatStorage"):
        module, _, attribute = name.rpartition(".")
        monkeypatch.setitem(sys.modules, module, stand_in)
        setattr(stand_in, attribute, type(attribute, (), {"__module__": module}))

    class Stored: ...

    class Saved:
        def __reduce__(self) -> Any:
            return vars(stand_in)["_rebuild_tensor_v2"], (Stored(), 0, (2, 4), (4, 1), False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> Any:
            if isinstance(value, Stored):
                return "storage", vars(stand_in)["FloatStorage"], "0", "cpu", 8
            return None

    buffer = io.BytesIO()
    names = ["a" * 300, *map(str, range(300))]
    Pickler(buffer, protocol).dump(OrderedDict((name, Saved()) for name in names))
    found = read(tmp_path, zip_form(buffer.getvalue(), {"0": DATA}))
    assert list(found) == names
    assert all(values(info).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] for info in list(found.values())[::50])


# What runs code in an unpickler


class Call:
    """Pickled as the application of a function to arguments."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


ATTACKS: dict[str, Callable[[str], Call]] = {
    "system": lambda victim: Call(os.system, f"touch '{victim}'"),
    "check_call": lambda victim: Call(subprocess.check_call, ["touch", victim]),
    "eval": lambda victim: Call(eval, f"open({victim!r}, 'w').close()"),
    "exec": lambda victim: Call(exec, f"open({victim!r}, 'w').close()"),
}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ATTACKS)
def test_no_code_runs(tmp_path: Path, name: str, protocol: int) -> None:
    victim = tmp_path / "victim"
    attack = ATTACKS[name](str(victim))
    data = pickle.dumps({"a": attack}, protocol)
    pickle.loads(data)
    assert victim.exists(), "the attack is one"
    victim.unlink()
    assert re.search(rf"holds the global '\w+\.{name}'", refused_pickle(tmp_path, data))
    assert not victim.exists()


@pytest.mark.parametrize(
    "name",
    [
        "posix.system", "nt.system", "builtins.eval", "__builtin__.eval", "builtins.getattr", "builtins.__import__",
        "copyreg._reconstructor", "copy_reg._reconstructor", "functools.partial", "operator.attrgetter",
        "importlib.import_module", "numpy.core.multiarray._reconstruct", "_codecs.encode", "torch.load",
        "torch._utils._rebuild_from_type_v2", "torch._utils._rebuild_qtensor", "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_parameter_with_state", "torch._tensor._rebuild_from_type_v2", "torch.Size",
        "torch.device", "torch.nn.modules.linear.Linear", "torch.QInt8Storage", "torch.ComplexFloatStorage",
        "torch.float8_e4m3fnuz", "collections.OrderedDict.__init__", "collections.OrderedDict.fromkeys",
    ],
)  # fmt: skip
def test_every_other_global_is_refused_by_name(tmp_path: Path, name: str) -> None:
    assert f"holds the global '{name}'" in refused_pickle(tmp_path, state(a=named(name)))
    module, _, attribute = name.rpartition(".")
    on_the_stack = text(module) + text(attribute) + b"\x93"
    assert f"holds the global '{name}'" in refused_pickle(tmp_path, state(a=on_the_stack))


def test_globals_are_values_of_no_power() -> None:
    """What a pickle can name are numbers and texts of this package: none of them can be called."""
    assert not any(callable(value) for value in GLOBALS.values())


def test_a_name_reaches_no_terminal_as_it_is(tmp_path: Path) -> None:
    message = refused_pickle(tmp_path, state(a=named("os.\x1b[2J\u202e" + "x" * 60)))
    assert "x1b[2J" in message


# Programs that ask for what tensors do not need, or that make no sense

WHERE = storage()
PLAIN = (number(0), sizes((2, 4)), sizes((4, 1)), b"\x89")


def rebuilt(*arguments: bytes, name: str = TENSOR) -> bytes:
    return applied(name, *arguments)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        # allowed globals, absurd arguments
        (rebuilt(), f"arguments that {TENSOR} does not take"),
        (rebuilt(WHERE), "arguments that"),
        (rebuilt(WHERE, *PLAIN), "arguments that"),
        (rebuilt(WHERE, *PLAIN, b"N"), "arguments that"),
        (rebuilt(text("x"), *PLAIN, hooks()), "arguments that"),
        (rebuilt(WHERE, *PLAIN, hooks(), mapping({"conj": b"\x88"})), "arguments that"),
        (rebuilt(WHERE, *PLAIN, hooks(), b"N", b"N"), "arguments that"),
        (rebuilt(WHERE, number(-1), *PLAIN[1:], hooks()), "arguments that"),
        (rebuilt(WHERE, b"\x88", *PLAIN[1:], hooks()), "arguments that"),
        (rebuilt(WHERE, number(2**70), *PLAIN[1:], hooks()), "arguments that"),
        (tensor(shape=(2, -4)), "arguments that"),
        (tensor(strides=(-4, 1)), "arguments that"),
        (tensor(strides=(4,)), "arguments that"),
        (tensor(shape=[1] * 9, strides=[1] * 9), "arguments that"),
        (rebuilt(WHERE, number(0), b"](K\x02K\x04e", *PLAIN[2:], hooks()), "arguments that"),
        (rebuilt(WHERE, number(0), text("24"), *PLAIN[2:], hooks()), "arguments that"),
        (tensor(storage(kind="torch.storage.UntypedStorage")), "arguments that"),
        (rebuilt(WHERE, *PLAIN, hooks(), b"N", name="torch._utils._rebuild_tensor_v3"), "arguments that"),
        (applied("torch._utils._rebuild_parameter", WHERE, b"\x88", hooks()), "arguments that"),
        (applied("collections.OrderedDict", b"](e"), "arguments that collections.OrderedDict does not take"),
        (named("collections.OrderedDict") + b"NR", "arguments that"),
        (applied("torch.FloatStorage", number(1 << 60)), "the application of a value of type StorageType"),
        (tensor() + b")R", "the application of a value of type TensorRef"),
        (text("eval") + b")R", "the application of a value of type str"),
        # instructions that make objects or take names from elsewhere
        (named("collections.OrderedDict") + b")\x81", "the instruction NEWOBJ"),
        (named("collections.OrderedDict") + b")}\x92", "the instruction NEWOBJ_EX"),
        (b"(icollections\nOrderedDict\n", "the instruction INST"),
        (b"(" + named("collections.OrderedDict") + b"o", "the instruction OBJ"),
        (b"\x82\x01", "the instruction EXT1"),
        (b"P0\n", "the instruction 0x50"),
        (b"\x97", "the instruction 0x97"),
        (b"\xff", "the instruction 0xff"),
        (b"\x80\x06", "protocol 6"),
        # attributes
        (tensor() + b"}b", "attributes of what is no OrderedDict"),
        (b"}}b", "attributes of what is no OrderedDict"),
        (hooks() + b"Nb", "attributes of what is no OrderedDict"),
        (named("collections.OrderedDict") + b"}b", "attributes of what is no OrderedDict"),
        # persistent ids
        (b"NQ", "a persistent id that is not of a storage"),
        (row(text("module"), named("torch.FloatStorage"), b"N", b"N") + b"Q", "a persistent id"),
        (row(text("storage"), text("FloatStorage"), text("0"), text("cpu"), number(8)) + b"Q", "a persistent id"),
        (row(text("storage"), named("torch.FloatStorage"), number(0), text("cpu"), number(8)) + b"Q", "a persistent"),
        (storage(n_items=-1), "a persistent id"),
        (storage(n_items=2**64), "a persistent id"),
        (storage("0", "torch.FloatStorage", 8, text("view")), "a persistent id"),
        (storage("0", "torch.FloatStorage", 8, b"N", b"N"), "a persistent id"),
        (storage("0", "collections.OrderedDict"), "a persistent id"),
        # keys
        (b"}K\x01Ns", "a key that is no text but a value of type int"),
        (b"}" + tensor() + b"Ns", "a key that is no text but a value of type TensorRef"),
        (b"})Ns", "a key that is no text but a value of type tuple"),
        (b"}(" + (text("x") + b"N") * 2 + b"u", "the key 'x' twice"),
        # a stack, a memo and lengths at odds with themselves
        (b"\x87\x87", "a value where there is none"),
        (b"NR", "the application of a value of type str"),
        (b"t" * 3, "it lacks a mark"),
        (b"(\x85", "a value where there is none"),
        (b"(q\x00", "a value where there is none"),
        (b"N(", "a value where there is none"),
        (b"NNa", "extends a list where there is none"),
        (b"N(NNu", "an item of a dict where there is none"),
        (b"}(Nu", "an item of a dict where there is none"),
        (b"](NNNu", "an item of a dict where there is none"),
        (b"h\x07", "recalls a value that it did not remember"),
        (b"Nr\xff\xff\xff\xff", "remembers more than"),
        (b"N.", "leaves values behind"),
        (b"K\x01K\x02\x93", "names a global by what is no text"),
        (b"c" + b"x" * 300, "the name of a global in it does not end"),
        (b"X\x02\x00\x00\x00\xff\xff", "is not UTF-8"),
        (b"\x8b\x00\x00\x00\x01", "an integer of 16,777,216 bytes"),
        (b"\x8b\xff\xff\xff\xff", "an integer of 4,294,967,295 bytes"),
        (b"\x8a\xff" + b"\x01" * 255, "an integer of 255 bytes"),
        (b"B\xff\xff\xff\xff", "takes more than"),
        (b"X\xff\xff\xff\x7f", "takes more than"),
        (b"\x8e" + b"\xff" * 8, "takes more than"),
        (b"\x8d" + b"\x7f" * 8, "takes more than"),
        (b"B\xff\xff\xff\x00", "is cut short"),
        (b"G\x00", "is cut short"),
    ],
)  # fmt: skip
def test_what_tensors_do_not_need_is_refused(tmp_path: Path, value: bytes, message: str) -> None:
    assert message in refused_pickle(tmp_path, b"\x80\x02}" + text("a") + value + b"s.")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"N", "holds a value of type NoneType where a dict of tensors should be"),
        (b"]", "holds a value of type list where"),
        (tensor(), "holds a value of type TensorRef where"),
        (mapping({"model": mapping({"a": tensor()}), "epoch": number(3)}), "holds a dict under 'model'"),
        (mapping({"state_dict": hooks()}), "holds a dict under 'state_dict'"),
        (mapping({"a": tensor(), "step": number(3)}), "holds a value of type int under 'step'"),
        (mapping({"a": storage()}), "holds a value of type StorageRef under 'a'"),
    ],
)
def test_what_is_no_state_dict(tmp_path: Path, value: bytes, message: str) -> None:
    assert message in refused_pickle(tmp_path, program(value))


# Bounds of time and memory


@contextmanager
def within_seconds(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        (b"]" * 2**21, "its stack grows beyond"),
        (b"(" * 2**21, "its stack grows beyond"),
        (b"]" + b"Na" * 2**21, "more than 4,000,000 instructions"),
        (b"N" + b"".join(b"r" + struct.pack("<I", i) for i in range(2**20 + 1)), "remembers more than"),
        (
            b"](" + named(TENSOR) + b"q\x00" + row(WHERE, *PLAIN, hooks()) + b"q\x01R" + b"h\x00h\x01R" * 65_536,
            "more than 65,536 tensors",
        ),
        (b"](" + text("x" * 2**20) * 33, "takes more than 33,554,432 bytes"),
        # so deep that a walk would end the process
        (b"N" + b"\x85" * 2**20, "holds a value of type tuple where"),
        (b"]" * 99_999 + b"a" * 99_998, "holds a value of type list where"),
        ((b"}" + text("x")) * 40_000 + b"N" + b"s" * 40_000, "holds a dict under 'x'"),
        ((hooks() + text("x")) * 40_000 + b"N" + b"s" * 40_000, "holds a dict under 'x'"),
        # so shared that a walk would never end: a tree of 2^65536 leaves, a list within itself
        (b"N" + b"q\x00h\x00\x86" * 2**16, "holds a value of type tuple where"),
        (b"]q\x00h\x00a", "holds a value of type list where"),
        (b"]q\x00" + b"h\x00a" * 2**19 + b"\x85Q", "a persistent id that is not of a storage"),
    ],
    ids=range(13),
)  # fmt: skip
def test_programs_that_grow(tmp_path: Path, instructions: bytes, message: str) -> None:
    with within_seconds(30):
        assert message in str(refusal(tmp_path, legacy_head() + program(instructions)))


# Nothing but named errors, whatever the program

words = st.sampled_from(
    [
        *(tensor(), storage(), hooks(), text("a"), sizes((2, 4)), number(2**40)),
        *(named(TENSOR), named("torch.FloatStorage"), named("os.system"), b"X\xff\0\0\0"),
        *(bytes([code]) for code in b"N\x88]})(t\x85\x86\x87aesu\x94QRb\x93"),
        *(b"K\x00", b"K\x01", b"q\x00", b"q\x01", b"h\x00", b"h\x01"),
    ]
)


@thorough
@given(instructions=st.lists(words, max_size=30))
def test_any_program(tmp_path: Path, instructions: list[bytes]) -> None:
    end_well_or_by_name(tmp_path, zip_form(b"\x80\x02}" + text("x") + b"".join(instructions) + b"s.", {"0": DATA}))
