"""The devices that llama.cpp can compute on, as this build of it sees them."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models import native
from models.errors import LoadError
from models.text import printable

Kind = Literal["cpu", "gpu", "igpu", "accelerator", "other"]

_KINDS: dict[int, Kind] = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accelerator"}

_GPU_BACKENDS = ("CUDA", "HIP", "ROCm", "MUSA", "Vulkan", "Metal", "MTL", "SYCL", "CANN", "OpenCL", "WebGPU")
"""Names that a build's registry of a GPU backend may have. RPC is none: it has devices only when told of a server."""


_REBUILD = 'CMAKE_ARGS="-DGGML_CUDA=ON -DGGML_RPC=ON" pip install --no-cache-dir --force-reinstall llama-cpp-python'


@dataclass(frozen=True)
class Device:
    """One device. Bytes as it reports them itself; a CPU's `free` is often its total."""

    name: str
    description: str
    kind: Kind
    free: int
    total: int

    @property
    def is_gpu(self) -> bool:
        return self.kind in ("gpu", "igpu")


def devices() -> list[Device]:
    """All devices, in llama.cpp's order."""
    ggml, base = _ggml(), _base()
    found = []
    for index in range(ggml.ggml_backend_dev_count()):
        pointer = ggml.ggml_backend_dev_get(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        base.ggml_backend_dev_memory(pointer, ctypes.byref(free), ctypes.byref(total))
        found.append(
            Device(
                name=printable(base.ggml_backend_dev_name(pointer).decode("utf-8", "replace")),
                description=printable(base.ggml_backend_dev_description(pointer).decode("utf-8", "replace")),
                kind=_KINDS.get(base.ggml_backend_dev_type(pointer), "other"),
                free=free.value,
                total=total.value,
            )
        )
    return found


def offload_devices() -> list[Device]:
    """The devices that layers can be placed on: GPUs, and integrated ones only where there is no other."""
    found = [device for device in devices() if device.is_gpu]
    return [device for device in found if device.kind == "gpu"] or found


def backends() -> list[str]:
    """Names of the backends in this build, such as "CPU", "CUDA", "RPC"."""
    ggml, base = _ggml(), _base()
    return [
        base.ggml_backend_reg_name(ggml.ggml_backend_reg_get(index)).decode("utf-8", "replace")
        for index in range(ggml.ggml_backend_reg_count())
    ]


def why_no_gpu() -> str:
    """One line for a machine where `offload_devices()` is empty: why, and which command mends it."""
    if any(name.startswith(_GPU_BACKENDS) for name in backends()):
        return "CPU only: this build can use a GPU, but its driver reports none; `nvidia-smi` shows what it sees"
    why = "there is an NVIDIA GPU, but this" if _has_nvidia_gpu() else "no GPU was found, and this"
    toolkit = "" if shutil.which("nvcc") else "the CUDA toolkit and "
    return f"CPU only: {why} build of llama.cpp has no GPU backend; to use a GPU: {toolkit}{_REBUILD}"


def _has_nvidia_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def add_rpc_device(endpoint: str) -> None:
    """Make the devices of an RPC server (`host:port`) known to llama.cpp, for good.

    They count as GPUs from here on. Raises LoadError where the build has no RPC backend or no server answers.
    A server lost later ends this process.
    """
    ggml, base = _ggml(), _base()
    registry = ggml.ggml_backend_reg_by_name(b"RPC")
    if not registry:
        raise LoadError(
            "this build of llama.cpp has no RPC backend",
            hint='CMAKE_ARGS="-DGGML_RPC=ON" pip install --no-cache-dir --force-reinstall llama-cpp-python',
        )
    _check_listens(endpoint)  # llama.cpp would end the process
    address = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_rpc_add_server")
    add_server = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)
    with native.capture_log() as log:
        server = add_server(os.fsencode(endpoint))
    if not server:
        said = "; ".join(log.problems())
        raise LoadError(f"no RPC server answers at {endpoint}: {said}", endpoint=endpoint)
    ggml.ggml_backend_register(server)


def _check_listens(endpoint: str) -> None:
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        raise LoadError(f"no RPC server answers at {endpoint}: {error}", endpoint=endpoint) from error


def _ggml() -> Any:
    """libggml, the registry of backends and devices."""
    lib = native.shared_library("ggml")
    for name in ("ggml_backend_dev_count", "ggml_backend_reg_count"):
        getattr(lib, name).restype = ctypes.c_size_t
    for name in ("ggml_backend_dev_get", "ggml_backend_reg_get"):
        getattr(lib, name).argtypes = [ctypes.c_size_t]
        getattr(lib, name).restype = ctypes.c_void_p
    lib.ggml_backend_reg_by_name.argtypes = [ctypes.c_char_p]
    lib.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    lib.ggml_backend_register.argtypes = [ctypes.c_void_p]
    lib.ggml_backend_register.restype = None
    return lib


def _base() -> Any:
    """libggml-base, what can be asked of one backend or device."""
    lib = native.shared_library("ggml-base")
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description", "ggml_backend_reg_name"):
        getattr(lib, name).argtypes = [ctypes.c_void_p]
        getattr(lib, name).restype = ctypes.c_char_p
    lib.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    lib.ggml_backend_dev_type.restype = ctypes.c_int
    pointer = ctypes.POINTER(ctypes.c_size_t)
    lib.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, pointer, pointer]
    lib.ggml_backend_dev_memory.restype = None
    lib.ggml_backend_reg_get_proc_address.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    lib.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
    return lib
