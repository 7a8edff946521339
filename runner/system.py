"""What a machine is, as far as it matters for running models: gathered here, and judged in `runner.doctor`."""

from __future__ import annotations

import mmap
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from models.errors import HandmillError
from runner.devices import Device, gpu_backend_files
from runner.engine.memory import memory_limits
from runner.engine.threads import default_threads

_NVIDIA, _AMD, _INTEL = "0x10de", "0x1002", "0x8086"
_MAKERS = {_NVIDIA: "NVIDIA", _AMD: "AMD", _INTEL: "Intel"}
_DISK_SAMPLE = 64 << 20
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "fuse.rclone", "drvfs", "virtiofs")


@dataclass(frozen=True)
class Disk:
    """Where models lie. `bytes_per_second` as measured now, past the cache; None where that could not be."""

    path: str
    kind: str = ""
    """The file system."""
    rotates: bool = False
    bytes_per_second: float | None = None

    @property
    def is_network(self) -> bool:
        return self.kind in _NETWORK


@dataclass(frozen=True)
class System:
    """A machine. Sizes in bytes; versions as tuples of numbers."""

    platform: str = "linux"
    """As `sys.platform`."""
    distribution: tuple[str, ...] = ()
    """Of a Linux: its name and those of which it is a kind, such as ("ubuntu", "debian")."""
    release: tuple[int, ...] = ()
    """Of a Linux, such as (24, 4)."""
    container: str = ""
    """"docker", "podman", "kubernetes" or another; "" on the machine itself."""
    wsl: bool = False
    python: str = "python3"
    llama_version: str = ""
    failure: str = ""
    """Why llama.cpp cannot be used at all, or not asked about its devices."""
    backends: tuple[str, ...] = ()
    backend_files: tuple[str, ...] = ()
    """Backends for GPUs that the build has, as its files are called ("cuda"), whether they start or not."""
    build: frozenset[str] = frozenset()
    """What the CPU code of this build uses: "AVX2", "FMA"."""
    cuda_runtime: int | None = None
    """Major version of the CUDA that this build was linked with."""
    devices: tuple[Device, ...] = ()
    gpus: tuple[str, ...] = ()
    """Makers of the GPUs on the bus, whether anything can use them or not."""
    driver: tuple[int, ...] = ()
    """Version of the NVIDIA driver that is loaded; () for none."""
    driver_library: bool = True
    """Whether the library of that driver is there, where the build needs it."""
    nodes: frozenset[str] = frozenset()
    """Of /dev: "nvidia0", "kfd", "dri", those that are there; "kfd!" for one that this person may not open."""
    tools: frozenset[str] = frozenset()
    """Programs on the path: "nvcc", "nvidia-smi", "ubuntu-drivers"; "c++" for any compiler of C++."""
    environment: Mapping[str, str] = field(default_factory=dict)
    cpu_flags: frozenset[str] = frozenset()
    processor: str = ""
    threads: int = 1
    memory_total: int = 0
    memory_available: int = 0
    memory_of_machine: int = 0
    """What of the machine's memory is available, limits of this process aside."""
    memory_limit: str = ""
    """What leaves the least: "machine", "control group" or "process"."""
    swap_used: int = 0
    on_battery: bool = False
    saves_power: bool = False
    disk: Disk | None = None
    model: str = ""
    """The model used last, and its bytes."""
    model_bytes: int = 0

    @property
    def offload(self) -> tuple[Device, ...]:
        return tuple(device for device in self.devices if device.is_gpu)


def gather(root: Path = Path("/")) -> System:
    """Look at this machine. Never raises: what cannot be found out is left out."""
    from importlib.metadata import PackageNotFoundError, version

    (distribution, release), cpu, memory = (
        _os_release(root),
        _read(root / "proc/cpuinfo"),
        _numbers(_read(root / "proc/meminfo")),
    )
    found, failure = _ask_llama()
    model = _last_used()
    try:
        installed = version("llama-cpp-python")
    except PackageNotFoundError:
        installed = ""
    limits = memory_limits()
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpu, re.MULTILINE)
    name = re.search(r"^model name\s*:(.*)$", cpu, re.MULTILINE)
    return System(
        platform=sys.platform,
        distribution=distribution,
        release=release,
        container=_container(root),
        wsl="microsoft" in _read(root / "proc/version").lower(),
        python=sys.executable,
        llama_version=installed,
        failure=failure,
        backends=found.backends,
        backend_files=tuple(gpu_backend_files()),
        build=found.build,
        cuda_runtime=found.cuda_runtime,
        devices=found.devices,
        gpus=_gpus(root),
        driver=_driver(root),
        driver_library=found.driver_library,
        nodes=_nodes(root),
        tools=_tools(),
        environment={key: value for key, value in os.environ.items() if key.endswith("VISIBLE_DEVICES")},
        cpu_flags=frozenset(flags[1].split()) if flags else frozenset(),
        processor=(name[1].strip() if name else "") or platform.processor() or platform.machine(),
        threads=default_threads(),
        memory_total=memory.get("MemTotal", 0) or next((d.total for d in found.devices if d.kind == "cpu"), 0),
        memory_available=min(limits.values(), default=0),
        memory_of_machine=limits.get("machine", 0),
        memory_limit=min(limits, key=limits.__getitem__, default=""),
        swap_used=memory.get("SwapTotal", 0) - memory.get("SwapFree", 0),
        on_battery=_on_battery(root),
        saves_power=_read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() == "powersave"
        and _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver").strip() != "intel_pstate",
        disk=_disk(root, model),
        model=model.name if model else "",
        model_bytes=model.stat().st_size if model else 0,
    )


@dataclass(frozen=True)
class LlamaSays:
    """What llama.cpp says of its build and its devices."""

    backends: tuple[str, ...] = ()
    build: frozenset[str] = frozenset()
    cuda_runtime: int | None = None
    driver_library: bool = True
    devices: tuple[Device, ...] = ()


def ask_llama() -> LlamaSays:
    """To be called in a process of its own: a driver that is broken may end it."""
    from models import missing_driver, native
    from runner import devices

    lib = native.library()
    driver_library = not missing_driver.is_missing()
    said = lib.llama_print_system_info().decode("utf-8", "replace")
    build = frozenset(re.findall(r"(\w+) = 1\b", said))
    runtime = _cuda_runtime(lib._base_path)
    return LlamaSays(tuple(devices.backends()), build, runtime, driver_library, tuple(devices.devices()))


def _ask_llama() -> tuple[LlamaSays, str]:
    from models.isolated import Ended, isolation

    try:
        with isolation("runner.system") as apart:
            return apart.call(ask_llama, seconds=60), ""
    except (Ended, HandmillError) as error:
        return LlamaSays(), str(error)


def _cuda_runtime(folder: Path) -> int | None:
    """The major version in the name of the CUDA library that the backend was linked with."""
    with suppress(OSError, ValueError):
        for path in folder.glob("*ggml-cuda*"):
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                if match := re.search(rb"(?:libcudart\.so\.|cudart64_)(\d+)", data):
                    return int(match[1])
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _numbers(meminfo: str) -> dict[str, int]:
    found = re.findall(r"^(\w+): +(\d+) kB$", meminfo, re.MULTILINE)
    return {name: int(kilobytes) * 1024 for name, kilobytes in found}


def _os_release(root: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    said = dict(re.findall(r'^(ID|ID_LIKE|VERSION_ID)="?([^"\n]*)"?$', _read(root / "etc/os-release"), re.MULTILINE))
    release = re.findall(r"\d{1,6}", said.get("VERSION_ID", ""))
    return tuple(f"{said.get('ID', '')} {said.get('ID_LIKE', '')}".split()), tuple(map(int, release))


def _container(root: Path) -> str:
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    if (root / "var/run/secrets/kubernetes.io").exists():
        return "kubernetes"
    return ""


def _gpus(root: Path) -> tuple[str, ...]:
    """Makers of display controllers and accelerators on the PCI bus, other than graphics inside an Intel CPU."""
    found = []
    with suppress(OSError):
        for device in sorted((root / "sys/bus/pci/devices").iterdir()):
            vendor, kind = _read(device / "vendor").strip(), _read(device / "class").strip()
            displays = kind.startswith("0x03") or (kind.startswith("0x12") and vendor == _AMD)
            if displays and vendor in _MAKERS and not (vendor == _INTEL and device.name == "0000:00:02.0"):
                found.append(_MAKERS[vendor])
    return tuple(found)


def _tools() -> frozenset[str]:
    found = {tool for tool in ("nvcc", "nvidia-smi", "ubuntu-drivers", "hipcc", "glslc") if shutil.which(tool)}
    return frozenset(found | ({"c++"} if any(map(shutil.which, ("c++", "g++", "clang++"))) else set()))


def _driver(root: Path) -> tuple[int, ...]:
    match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", _read(root / "proc/driver/nvidia/version"))
    return tuple(map(int, match[1].split("."))) if match else ()


def _nodes(root: Path) -> frozenset[str]:
    found = set()
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm", "kfd", "dri", "dxg"):
        path = root / "dev" / name
        if path.exists():
            found.add(name if os.access(path, os.R_OK | os.W_OK) or path.is_dir() else f"{name}!")
    return frozenset(found)


def _on_battery(root: Path) -> bool:
    """Whether a battery is being emptied, and no supply says that it is connected."""
    supplies: list[tuple[str, str, str]] = []
    with suppress(OSError):
        for supply in (root / "sys/class/power_supply").iterdir():
            kind, online, status = (_read(supply / name).strip() for name in ("type", "online", "status"))
            if _read(supply / "scope").strip() != "Device":  # a mouse has a battery, too
                supplies.append((kind, online, status))
    emptied = any(kind == "Battery" and status == "Discharging" for kind, _, status in supplies)
    return emptied and not any(kind != "Battery" and online == "1" for kind, online, _ in supplies)


def _last_used() -> Path | None:
    from models import library
    from models.starter import starter_path

    with suppress(HandmillError):
        return library.last_used() or starter_path()
    return None


def _disk(root: Path, model: Path | None) -> Disk | None:
    from models.library import models_folder

    path = model or models_folder()
    if not path.exists():
        return None
    device, kind = _mount(path.resolve(), _read(root / "proc/mounts").splitlines())
    name = re.sub(r"(?<=nvme\dn\d)p\d+$|(?<=[a-z])\d+$", "", Path(device).name)
    rotates = _read(root / f"sys/block/{name}/queue/rotational").strip() == "1"
    return Disk(str(path), kind, rotates, _read_speed(model) if model else None)


def _mount(path: Path, mounts: Iterable[str]) -> tuple[str, str]:
    """Device and file system of the mount that `path` is on."""
    best = ("", "", "")
    for line in mounts:
        device, where, kind = [*line.split(), "", "", ""][:3]
        where = where.replace("\\040", " ")
        if path.is_relative_to(where) and len(where) >= len(best[1]):
            best = device, where, kind
    return best[0], best[2]


def _read_speed(model: Path) -> float | None:
    """Bytes per second from the disk itself: what the system keeps of the file is let go first."""
    if not hasattr(os, "posix_fadvise"):
        return None
    with suppress(OSError), model.open("rb", buffering=0) as file:
        size = min(_DISK_SAMPLE, model.stat().st_size)
        os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        began, left = time.perf_counter(), size
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            left -= len(chunk)
        return (size - left) / max(time.perf_counter() - began, 1e-6)
    return None
