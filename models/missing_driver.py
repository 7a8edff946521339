"""A CUDA build of llama.cpp where NVIDIA's driver is not: a stand-in for the driver's library lets it load.

A build that is not split into plug-ins is linked with `libcuda.so.1`, which only the driver brings, so on a machine
without a driver the loader refuses all of it, the CPU's part too. The loader takes a library for another that says
that it is it (its SONAME), so one is made up here: all functions of the driver that the build names, and each only
answers that there is no device. CUDA then reports no GPU, and llama.cpp computes on the CPU.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

DRIVER = "libcuda.so.1"
_FUNCTION = re.compile(rb"\0(cu[A-Z]\w{1,80})(?=\0)")
_HEAD = 64 << 20
"""Bytes in which the names that a library needs of others are: they come before its code."""
_NO_DEVICE = {  # return 100, CUDA_ERROR_NO_DEVICE; the machine's number is elf.h's
    "x86_64": (62, bytes.fromhex("b864000000c3")),
    "aarch64": (183, bytes.fromhex("800c8052c0035fd6")),
}
_PAGE = 0x10000
"""The largest page that either machine has."""

_is_missing = False


def is_missing() -> bool:
    """Whether this process has a stand-in for the driver."""
    return _is_missing


def stand_in(folder: Path) -> bool:
    """Load one for what the libraries in `folder` need of the driver; False where that cannot be done."""
    global _is_missing
    if sys.platform != "linux" or platform.machine() not in _NO_DEVICE:
        return False
    names: set[bytes] = set()
    for path in folder.glob("libggml-cuda*.so*"):
        with suppress(OSError), path.open("rb") as file:
            names.update(_FUNCTION.findall(file.read(_HEAD)))
    memory = os.memfd_create(DRIVER)
    try:
        os.write(memory, library(DRIVER.encode(), sorted(names), *_NO_DEVICE[platform.machine()]))
        ctypes.CDLL(f"/proc/self/fd/{memory}")
    except OSError:
        return False
    finally:
        os.close(memory)
    _is_missing = True
    return True


def library(soname: bytes, functions: Sequence[bytes], machine: int, code: bytes) -> bytes:
    """An ELF library of functions that all run the same code. Layout by the System V ABI, chapters 4 and 5.

    Two segments: what is only read and the code, then the dynamic section, which the loader writes to.
    """
    strings = b"\0" + b"".join(name + b"\0" for name in (soname, *functions))
    at_code = 64 + 4 * 56  # behind the header and four program headers
    at_symbols = at_code + 16
    count = len(functions) + 1
    at_hash = at_symbols + 24 * count
    at_strings = at_hash + 4 * (3 + count)
    symbols, name = bytes(24), 1 + len(soname) + 1
    for function in functions:
        symbols += struct.pack("<IBBHQQ", name, 0x12, 0, 1, at_code, len(code))  # a global function
        name += len(function) + 1
    # One bucket, whose chain goes through all symbols down to the empty one.
    chains = struct.pack(f"<{3 + count}I", 1, count, count - 1, 0, *range(count - 1))
    entries = {
        14: 1,
        4: at_hash,
        5: at_strings,
        6: at_symbols,
        10: len(strings),
        11: 24,
        0: 0,
    }  # DT_SONAME ... DT_NULL
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries.items())
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, 4, 64, 0, 0)
    first = at_strings + len(strings)

    def segment(kind: int, flags: int, start: int, size: int, align: int) -> bytes:
        return struct.pack("<IIQQQQQQ", kind, flags, start, start, start, size, size, align)

    at_dynamic = -(-first // _PAGE) * _PAGE
    segments = segment(1, 5, 0, first, _PAGE)  # PT_LOAD, to be read and run
    segments += segment(1, 6, at_dynamic, len(dynamic), _PAGE)  # PT_LOAD, to be read and written
    segments += segment(2, 6, at_dynamic, len(dynamic), 8)  # PT_DYNAMIC
    segments += segment(0x6474E551, 6, 0, 0, 16)  # PT_GNU_STACK: the stack is not to be run
    whole = header + segments + code.ljust(16, b"\0") + symbols + chains + strings
    return whole.ljust(at_dynamic, b"\0") + dynamic
