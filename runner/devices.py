"""The devices that llama.cpp can compute on, as this build of it sees them."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models import missing_driver, native
from models.errors import LoadError
from models.text import printable
from runner.engine.memory import available_memory

Kind = Literal["cpu", "gpu", "igpu", "accelerator", "other"]

_KINDS: dict[int, Kind] = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accelerator"}

GPU_BACKENDS = ("CUDA", "HIP", "ROCm", "MUSA", "Vulkan", "Metal", "MTL", "SYCL", "CANN", "OpenCL", "WebGPU")
"""Names that a build's registry of a GPU backend may have. RPC is none: it has devices only when told of a server."""


LOOK_WITH = {"CUDA": "nvidia-smi", "HIP": "rocminfo", "ROCm": "rocminfo", "Vulkan": "vulkaninfo --summary"}
"""By backend, the command that shows what its driver sees."""

_BACKEND_FILE = re.compile(r"(?:lib)?ggml-(\w+)\.(?:so|dylib|dll)")
_OF_THE_CPU = ("base", "cpu", "blas", "rpc")
"""Files of backends that end no process: those of the CPU, and of workers where there are none."""


@dataclass(frozen=True)
class Device:
    """One device. `free` and `total` in bytes, as it reports them itself; of a CPU, what this process may take."""

    name: str
    description: str
    kind: Kind
    free: int
    total: int
    backend: str = ""
    """Such as "CPU", "CUDA", "RPC"."""
    buffer_type: str = ""
    """What llama.cpp's log calls its memory: of the device "RPC0", "RPC0[host:port]"."""

    @property
    def is_gpu(self) -> bool:
        return self.kind in ("gpu", "igpu")


def devices() -> list[Device]:
    """All devices, in llama.cpp's order."""
    base = ggml_base()

    def text(function: str, pointer: int | None) -> str:
        raw = getattr(base, function)(pointer) if pointer else None
        return printable((raw or b"").decode("utf-8", "replace"))

    found = []
    for pointer in pointers():
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        base.ggml_backend_dev_memory(pointer, ctypes.byref(free), ctypes.byref(total))
        kind = _KINDS.get(base.ggml_backend_dev_type(pointer), "other")
        # A CPU reports the machine's memory as free, and an accelerator beside it nothing.
        available = available_memory() if kind == "cpu" else None
        found.append(
            Device(
                name=text("ggml_backend_dev_name", pointer),
                description=text("ggml_backend_dev_description", pointer),
                kind=kind,
                free=free.value if available is None else min(free.value, available),
                total=total.value,
                backend=text("ggml_backend_reg_name", base.ggml_backend_dev_backend_reg(pointer)),
                buffer_type=text("ggml_backend_buft_name", base.ggml_backend_dev_buffer_type(pointer)),
            )
        )
    return found


def free_memory(name: str) -> int:
    """Bytes free on the device called `name`, as it reports them. Raises LoadError."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ggml_base().ggml_backend_dev_memory(pointer_of(name), ctypes.byref(free), ctypes.byref(total))
    return free.value


def pointers() -> list[int]:
    """The `ggml_backend_dev_t` of each of `devices()`, in the same order."""
    registry = ggml()
    return [registry.ggml_backend_dev_get(index) for index in range(registry.ggml_backend_dev_count())]


def pointer_of(name: str) -> int:
    """The `ggml_backend_dev_t` of the device called `name`. Raises LoadError."""
    base = ggml_base()
    for pointer in pointers():
        if printable(base.ggml_backend_dev_name(pointer).decode("utf-8", "replace")) == name:
            return pointer
    raise LoadError(f"there is no device {name} any more", device=name)


def is_elsewhere(name: str) -> bool:
    """Whether the device called `name` is another machine's. Raises LoadError."""
    base = ggml_base()
    registry = base.ggml_backend_dev_backend_reg(pointer_of(name))
    return bool(base.ggml_backend_reg_name(registry) == b"RPC")


def cpu_buffer_type() -> int:
    """The `ggml_backend_buffer_type_t` of plain CPU memory."""
    base, pointer = ggml_base(), ggml().ggml_backend_dev_by_type(0)
    return int(base.ggml_backend_dev_buffer_type(pointer))


def device_of_buffer_type(buffer_type: int) -> str:
    """The name of the device that memory of this `ggml_backend_buffer_type_t` is on; "CPU" for the machine's own."""
    base = ggml_base()
    pointer = base.ggml_backend_buft_get_device(buffer_type)
    if not pointer or base.ggml_backend_buft_is_host(buffer_type) or base.ggml_backend_dev_type(pointer) == 0:
        return "CPU"
    return printable(base.ggml_backend_dev_name(pointer).decode("utf-8", "replace"))


def offload_devices(found: Sequence[Device] | None = None) -> list[Device]:
    """The devices that layers can be placed on: GPUs, integrated ones only where this machine has no other.

    Of `found`, where another process has looked already.
    """
    gpus = [device for device in (devices() if found is None else found) if device.is_gpu]
    own = [device for device in gpus if device.backend != "RPC"]
    own = [device for device in own if device.kind == "gpu"] or own
    return [device for device in gpus if device in own or device.backend == "RPC"]


def has_offload_device() -> bool:
    """Whether there is any; without asking it anything, since one that is away ends the process."""
    base = ggml_base()
    return any(_KINDS.get(base.ggml_backend_dev_type(pointer)) in ("gpu", "igpu") for pointer in pointers())


def gpu_backend_files() -> list[str]:
    """Backends for GPUs that this build has, by the names of its files ("cuda"): nothing is loaded for it."""
    files = [file.name for folder in native.library_folders() for file in folder.glob("*ggml-*")]
    names = {match[1] for name in files if (match := _BACKEND_FILE.match(name))}
    return sorted(name for name in names if not name.startswith(_OF_THE_CPU))


def backends() -> list[str]:
    """Names of the backends in this build, such as "CPU", "CUDA", "RPC"."""
    registry, base = ggml(), ggml_base()
    return [
        base.ggml_backend_reg_name(registry.ggml_backend_reg_get(index)).decode("utf-8", "replace")
        for index in range(registry.ggml_backend_reg_count())
    ]


def rebuild_command(
    *flags: str, python: str = sys.executable, version: str | None = None, platform: str = sys.platform
) -> str:
    """How to compile llama-cpp-python anew with `flags` for cmake, in the shell of `platform`: of the same release.

    Another release than this project's has other layouts of what is read here.
    """
    version = importlib.metadata.version("llama-cpp-python") if version is None else version
    install = f'"{python}"' if " " in python else python
    install += " -m pip install --no-cache-dir --force-reinstall --no-deps llama-cpp-python"
    install += f"=={version}" if version else ""
    wanted = " ".join((*flags, "-DGGML_RPC=ON"))
    if platform == "win32":
        return f'$env:CMAKE_ARGS = "{wanted}"; {install}'
    return f'CMAKE_ARGS="{wanted}" {install}'


def why_no_gpu() -> str:
    """One line for a machine where `offload_devices()` is empty: why, and which command mends it."""
    known = backends()
    if missing_driver.is_missing():
        return (
            f"CPU only: this build is for CUDA, and NVIDIA's driver is not here ({missing_driver.DRIVER} is missing)"
        )
    for backend in (name for name in known if name.startswith(GPU_BACKENDS)):
        look = f"; `{LOOK_WITH[backend]}` shows what it sees" if backend in LOOK_WITH else ""
        return f"CPU only: this build can use a GPU through {backend}, but its driver reports none{look}"
    if there := gpu_backend_files():
        return f"CPU only: the backend {there[0]} of this build does not start here; `handmill doctor` looks for why"
    why = "there is an NVIDIA GPU, but this" if _has_nvidia_gpu() else "no GPU was found, and this"
    toolkit = "" if shutil.which("nvcc") else "the CUDA toolkit and "
    rebuild = rebuild_command("-DGGML_CUDA=ON")
    return f"CPU only: {why} build of llama.cpp has no GPU backend; to use a GPU: {toolkit}{rebuild}"


def _has_nvidia_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def ggml() -> Any:
    """libggml, the registry of backends and devices."""
    lib = native.shared_library("ggml")
    for name in ("ggml_backend_dev_count", "ggml_backend_reg_count"):
        getattr(lib, name).restype = ctypes.c_size_t
    for name in ("ggml_backend_dev_get", "ggml_backend_reg_get"):
        getattr(lib, name).argtypes = [ctypes.c_size_t]
        getattr(lib, name).restype = ctypes.c_void_p
    lib.ggml_backend_dev_by_type.argtypes = [ctypes.c_int]
    lib.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    lib.ggml_backend_reg_by_name.argtypes = [ctypes.c_char_p]
    lib.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    lib.ggml_backend_register.argtypes = [ctypes.c_void_p]
    lib.ggml_backend_register.restype = None
    return lib


def ggml_base() -> Any:
    """libggml-base, what can be asked of one backend or device."""
    lib = native.shared_library("ggml-base")
    for name in ("dev_name", "dev_description", "reg_name", "buft_name"):
        getattr(lib, f"ggml_backend_{name}").argtypes = [ctypes.c_void_p]
        getattr(lib, f"ggml_backend_{name}").restype = ctypes.c_char_p
    for name in ("dev_backend_reg", "dev_buffer_type", "buft_get_device"):
        getattr(lib, f"ggml_backend_{name}").argtypes = [ctypes.c_void_p]
        getattr(lib, f"ggml_backend_{name}").restype = ctypes.c_void_p
    lib.ggml_backend_buft_is_host.argtypes = [ctypes.c_void_p]
    lib.ggml_backend_buft_is_host.restype = ctypes.c_bool
    lib.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    lib.ggml_backend_dev_type.restype = ctypes.c_int
    pointer = ctypes.POINTER(ctypes.c_size_t)
    lib.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, pointer, pointer]
    lib.ggml_backend_dev_memory.restype = None
    lib.ggml_backend_reg_get_proc_address.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    lib.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
    return lib
