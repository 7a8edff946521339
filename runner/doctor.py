"""What stands between a machine and its models: each probe looks at a `System` and finds one thing, or nothing.

A finding carries the command that mends it on that very system.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from models.text import human_bytes
from runner import devices, rpc
from runner.devices import GPU_BACKENDS
from runner.system import System

Severity = Literal["error", "warning"]

_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""By CUDA's major version, the first NVIDIA driver that runs programs of it (CUDA's release notes)."""
_MISSING = re.compile(r"(lib[\w+.-]+): cannot open shared object file")
_CUDA_PACKAGES = {"debian": "nvidia-cuda-toolkit", "fedora": "cuda-toolkit", "arch": "cuda"}
_VULKAN_PACKAGES = {
    "debian": "glslc libvulkan-dev spirv-headers",
    "fedora": "glslc vulkan-loader-devel spirv-headers-devel",
    "arch": "shaderc vulkan-headers spirv-headers",
}
_VULKAN_HEADERS = "v1.4.309"
_NEW_VULKAN = {"ubuntu": 24, "debian": 13}
"""The first release of a system with Vulkan headers that llama.cpp compiles with."""
_LIBRARIES: Mapping[str, Mapping[str, str]] = {
    "libcudart": _CUDA_PACKAGES,
    "libcublas": _CUDA_PACKAGES,
    "libvulkan": {"debian": "libvulkan1", "fedora": "vulkan-loader", "arch": "vulkan-icd-loader"},
    "libgomp": {"debian": "libgomp1", "fedora": "libgomp", "arch": "gcc-libs"},
}
"""Packages that bring what builds of llama.cpp are linked with, by the beginning of its name."""
_SLOW_DISK = 200_000_000
"""Bytes per second under which a model of some gigabytes takes long to load."""


@dataclass(frozen=True)
class Finding:
    """`severity` "error" for what is badly wrong. `command` mends it; "" where a person has to do something else."""

    probe: str
    severity: Severity
    message: str
    command: str = ""


Probe = Callable[[System], Finding | None]


def examine(system: System) -> list[Finding]:
    """All findings, what is badly wrong first."""
    found = [finding for probe in PROBES if (finding := probe(system))]
    return sorted(found, key=lambda finding: finding.severity != "error")


def examine_workers(endpoints: Iterable[str]) -> list[Finding]:
    """Of `handmill worker`s that are to be used, those that cannot be."""
    _, left_out = rpc.reachable(endpoints)
    return [Finding("worker", "warning", message) for message in left_out]


def rebuild_command(system: System, *flags: str) -> str:
    """How to compile llama-cpp-python anew with `flags` for cmake, on that system, and what that takes."""
    build = devices.rebuild_command(
        *flags, python=system.python, version=system.llama_version, platform=system.platform
    )
    compiler = _package(system, debian="build-essential", fedora="gcc-c++", arch="base-devel")
    return build if "c++" in system.tools or not compiler else f"{compiler} && {build}"


def can_use_gpus(system: System) -> bool:
    """Whether this build has a backend for GPUs of this machine; RPC is for those of others."""
    return any(name.startswith(GPU_BACKENDS) for name in system.backends)


def _is_cuda(system: System) -> bool:
    return any(name.startswith("CUDA") for name in system.backends)


def _package(system: System, *, debian: str, fedora: str, arch: str, suse: str = "") -> str:
    """The command of this system's package manager; "" where it is not known."""
    for names, tool, package in (
        (("debian", "ubuntu"), "sudo apt install", debian),
        (("fedora", "rhel", "centos"), "sudo dnf install", fedora),
        (("arch",), "sudo pacman -S", arch),
        (("suse", "opensuse"), "sudo zypper install", suse or debian),
    ):
        if set(names) & set(system.distribution):
            return f"{tool} {package}"
    return ""


def llama_works(system: System) -> Finding | None:
    if not system.failure:
        return None
    command = rebuild_command(system)
    if missing := _MISSING.search(system.failure):
        package = next((names for start, names in _LIBRARIES.items() if missing[1].startswith(start)), {})
        command = (_package(system, **package) if package else "") or command
    message = system.failure if system.failure.startswith("llama.cpp") else f"llama.cpp ended: {system.failure}"
    return Finding("llama.cpp", "error", message, command)


def backend_missing(system: System) -> Finding | None:
    """There is a GPU, and the build has no code for any."""
    apple = system.platform == "darwin"
    if system.failure or system.backend_files or can_use_gpus(system) or not (system.gpus or system.driver or apple):
        return None
    maker = "Apple" if apple else "NVIDIA" if system.driver else system.gpus[0]
    message = f"there is a GPU by {maker}, and this build of llama.cpp has no GPU backend"
    return Finding("gpu-backend", "warning", message, _build_for(maker, system))


def _build_for(maker: str, system: System) -> str:
    """The command that brings a build for GPUs of this maker, and what such a build needs."""
    if maker == "Apple":
        return rebuild_command(system, "-DGGML_METAL=ON")
    if maker == "NVIDIA":
        packages = "" if "nvcc" in system.tools else _package(system, **_CUDA_PACKAGES)
        return " && ".join(filter(None, (packages, rebuild_command(system, "-DGGML_CUDA=ON"))))
    if maker == "AMD" and "hipcc" in system.tools:
        return rebuild_command(system, "-DGGML_HIP=ON")
    steps = [_package(system, **_VULKAN_PACKAGES) if "glslc" not in system.tools else ""]
    flags = ["-DGGML_VULKAN=ON"]
    if _has_old_vulkan(system):
        steps.append(f"git clone --depth 1 --branch {_VULKAN_HEADERS} https://github.com/KhronosGroup/Vulkan-Headers")
        flags.append("-DVulkan_INCLUDE_DIR=$PWD/Vulkan-Headers/include")
    return " && ".join(filter(None, (*steps, rebuild_command(system, *flags))))


def _has_old_vulkan(system: System) -> bool:
    """Whether the system's own Vulkan headers lack VK_EXT_layer_settings (1.3.272), which llama.cpp needs."""
    first = next((_NEW_VULKAN[name] for name in system.distribution if name in _NEW_VULKAN), None)
    return first is not None and system.release != () and system.release[0] < first


def driver_missing(system: System) -> Finding | None:
    if "NVIDIA" not in system.gpus or system.driver or system.wsl or system.container:
        return None
    command = _package(system, debian="nvidia-driver", fedora="akmod-nvidia", arch="nvidia", suse="nvidia-driver-G06")
    if "ubuntu" in system.distribution:
        command = "sudo ubuntu-drivers install"
    severity: Severity = "error" if _is_cuda(system) else "warning"
    return Finding("driver", severity, "there is an NVIDIA GPU, and its driver is not loaded", command)


def driver_too_old(system: System) -> Finding | None:
    oldest = _OLDEST_DRIVER.get(system.cuda_runtime or 0)
    if oldest is None or not system.driver or system.driver[0] >= oldest:
        return None
    version = ".".join(map(str, system.driver))
    command = _package(system, debian="--only-upgrade nvidia-driver", fedora="akmod-nvidia", arch="nvidia")
    if "ubuntu" in system.distribution:
        command = "sudo ubuntu-drivers install"
    return Finding(
        "driver",
        "error",
        f"the NVIDIA driver {version} is too old: this build uses CUDA {system.cuda_runtime}, which needs {oldest}",
        command,
    )


def gpu_hidden_by_container(system: System) -> Finding | None:
    there = system.driver or "NVIDIA" in system.gpus
    if not (system.container and there) or system.nodes & {"nvidia0", "nvidia0!", "dxg"}:
        return None
    severity: Severity = "error" if _is_cuda(system) else "warning"
    command = {
        "kubernetes": "kubectl set resources deployment NAME --limits=nvidia.com/gpu=1",
        "podman": "podman run --device nvidia.com/gpu=all ...",
    }.get(system.container, "docker run --gpus all ...")
    message = f"the machine has an NVIDIA GPU that is not visible in this container ({system.container})"
    return Finding("container", severity, message, command)


def driver_library_missing(system: System) -> Finding | None:
    """A CUDA build, and not the library of the driver that it is linked with (`models.missing_driver`)."""
    if system.driver_library or driver_missing(system) or gpu_hidden_by_container(system):
        return None
    message = "this build of llama.cpp is for CUDA, and the library of NVIDIA's driver (libcuda.so.1) is not here"
    if system.wsl:
        return Finding("driver", "error", message, "export LD_LIBRARY_PATH=/usr/lib/wsl/lib")
    if not (system.driver or "NVIDIA" in system.gpus):
        return Finding(
            "driver", "warning", f"{message}, nor a GPU by NVIDIA: the CPU computes", rebuild_command(system)
        )
    command = _package(system, debian="libcuda1", fedora="xorg-x11-drv-nvidia-cuda-libs", arch="nvidia-utils")
    if "ubuntu" in system.distribution:
        command = f"sudo apt install libnvidia-compute-{system.driver[0]}" if system.driver else command
    if system.container:
        command = "docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility ..."
    return Finding("driver", "error", message, command)


def gpu_hidden_by_environment(system: System) -> Finding | None:
    for name, value in sorted(system.environment.items()):
        if value.strip() in ("", "-1", "none", "void", "NoDevFiles") and (system.gpus or system.driver):
            message = f"{name} is set to {value!r}, which hides every GPU"
            return Finding("environment", "error", message, _unset(name, system))
    return None


def gpu_not_permitted(system: System) -> Finding | None:
    closed = sorted(node[:-1] for node in system.nodes if node.endswith("!"))
    if not closed:
        return None
    message = f"/dev/{closed[0]} is there, and you may not open it"
    return Finding("permission", "error", message, "sudo usermod -aG render,video $USER && newgrp render")


def build_without_device(system: System) -> Finding | None:
    """A GPU backend, no device, and nothing else that explains it."""
    if system.failure or system.offload or not can_use_gpus(system):
        return None
    if any(probe(system) for probe in _EXPLAIN):
        return None
    backend = next(name for name in system.backends if name.startswith(GPU_BACKENDS))
    message = f"this build has the backend {backend}, which finds no device"
    # What is on the bus is known on Linux only, and not inside WSL.
    nothing_there = system.platform == "linux" and not (system.gpus or system.driver or system.wsl)
    severity: Severity = "warning" if nothing_there else "error"
    return Finding("device", severity, message, devices.LOOK_WITH.get(backend, ""))


def backend_does_not_start(system: System) -> Finding | None:
    """A GPU backend among the build's files that llama.cpp does not register."""
    if system.failure or can_use_gpus(system) or not system.backend_files:
        return None
    message = f"the backend {system.backend_files[0]} of this build does not start here"
    if chosen := sorted(name for name in system.environment if name.startswith("GGML_")):
        message += f", where {chosen[0]} is {system.environment[chosen[0]]!r}"
        return Finding("device", "error", message, _unset(chosen[0], system))
    look = {name.lower(): command for name, command in devices.LOOK_WITH.items()}
    return Finding("device", "error", message, look.get(system.backend_files[0], ""))


def _unset(name: str, system: System) -> str:
    return f"Remove-Item Env:{name}" if system.platform == "win32" else f"unset {name}"


def on_battery(system: System) -> Finding | None:
    if not system.on_battery:
        return None
    return Finding("power", "warning", "the laptop runs on its battery, which slows it down: connect its supply")


def saves_power(system: System) -> Finding | None:
    if not system.saves_power or system.on_battery:
        return None
    message = "the processor is set to save power"
    return Finding("power", "warning", message, "sudo cpupower frequency-set -g performance")


def vectors_missing(system: System) -> Finding | None:
    if not system.cpu_flags & {"sse2", "avx"}:  # no x86, or unknown
        return None
    if "avx2" not in system.cpu_flags:
        return Finding(
            "avx2", "warning", "the processor has no AVX2: models run several times slower; choose small ones"
        )
    if system.failure or "AVX2" in system.build:
        return None
    message = "the processor has AVX2, and this build of llama.cpp does not use it: it is several times slower"
    return Finding("avx2", "error", message, rebuild_command(system, "-DGGML_NATIVE=ON"))


def memory_overcommitted(system: System) -> Finding | None:
    if not system.memory_total:
        return None
    left = f"{human_bytes(system.memory_available)} of {human_bytes(system.memory_total)} memory are available"
    if system.memory_available < system.memory_total // 20 and system.memory_of_machine < system.memory_total // 20:
        return Finding("memory", "error", f"memory is used up: {left}", _by_memory(system))
    if system.swap_used > system.memory_total // 4 and system.memory_available < system.memory_total // 4:
        message = f"memory is over-committed: {human_bytes(system.swap_used)} are swapped out, and {left}"
        return Finding("memory", "warning", message, _by_memory(system))
    return None


def _by_memory(system: System) -> str:
    if system.platform == "win32":
        return "Get-Process | Sort-Object WorkingSet -Descending | Select-Object -First 10"
    return "ps -eo rss,comm -m | head" if system.platform == "darwin" else "ps -eo rss,comm --sort=-rss | head"


def memory_limited(system: System) -> Finding | None:
    """A limit of the control group or of the process leaves much less than the machine has."""
    if system.memory_limit in ("", "machine") or system.memory_available >= system.memory_of_machine // 2:
        return None
    available, machine = human_bytes(system.memory_available), human_bytes(system.memory_of_machine)
    message = f"a limit of the {system.memory_limit} leaves {available} of memory, where the machine has {machine}"
    command = "ulimit -v unlimited"
    if system.memory_limit == "control group":
        runs = {"docker": "docker run --memory SIZE ...", "podman": "podman run --memory SIZE ..."}
        command = runs.get(system.container, "systemd-run --user --scope -p MemoryMax=infinity handmill chat")
        if system.container == "kubernetes":
            command = "kubectl set resources deployment NAME --limits=memory=SIZE"
    return Finding("memory-limit", "warning", message, command)


def model_too_large(system: System) -> Finding | None:
    room = system.memory_available + sum(device.free for device in system.offload if device.backend != "RPC")
    if not system.model or system.model_bytes <= room:
        return None
    message = f"{system.model} has {human_bytes(system.model_bytes)}, and {human_bytes(room)} of memory are available"
    return Finding("model", "warning", message, "handmill fit")


def slow_disk(system: System) -> Finding | None:
    disk = system.disk
    if disk is None:
        return None
    if disk.is_network:
        why = f"on a file system of the network or of another system ({disk.kind})"
    elif disk.bytes_per_second is not None and disk.bytes_per_second < _SLOW_DISK:
        why = f"on a disk that reads {human_bytes(disk.bytes_per_second)}/s"
    elif disk.bytes_per_second is None and disk.rotates:
        why = "on a disk that rotates"
    else:
        return None
    fast = "$env:HANDMILL_HOME = 'C:\\handmill'" if system.platform == "win32" else "export HANDMILL_HOME=FAST_FOLDER"
    return Finding("disk", "warning", f"models are {why}: they load slowly; move them to a fast disk", fast)


_EXPLAIN: tuple[Probe, ...] = (
    driver_missing,
    driver_too_old,
    gpu_hidden_by_container,
    driver_library_missing,
    gpu_hidden_by_environment,
    gpu_not_permitted,
)
"""What explains that a GPU backend finds no device."""

PROBES: tuple[Probe, ...] = (
    llama_works,
    *_EXPLAIN,
    backend_missing,
    build_without_device,
    backend_does_not_start,
    vectors_missing,
    memory_overcommitted,
    memory_limited,
    model_too_large,
    slow_disk,
    on_battery,
    saves_power,
)
