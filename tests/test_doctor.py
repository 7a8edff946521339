"""`handmill doctor` on machines that are made up, and what it gathers of a made-up file system."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from runner import system as gathering
from runner.cli import main as cli
from runner.devices import Device
from runner.doctor import PROBES, Finding, examine, rebuild_command
from runner.system import Disk, System, gather

GB = 1_000_000_000
CPU = Device("CPU", "a CPU", "cpu", 12 * GB, 16 * GB, "CPU", "CPU")
CUDA0 = Device("CUDA0", "a card", "gpu", 11 * GB, 12 * GB, "CUDA", "CUDA0")
SOUND = System(
    distribution=("debian",),
    python="/venv/bin/python",
    llama_version="0.3.36",
    backends=("CPU", "RPC"),
    build=frozenset({"AVX2", "FMA"}),
    devices=(CPU,),
    cpu_flags=frozenset({"sse2", "avx", "avx2"}),
    memory_total=16 * GB,
    memory_available=12 * GB,
    memory_of_machine=12 * GB,
    memory_limit="machine",
    tools=frozenset({"c++"}),
    disk=Disk("/models", "ext4", False, 2e9),
)
CARD = replace(
    SOUND,
    backends=("CUDA", "CPU"),
    devices=(CPU, CUDA0),
    gpus=("NVIDIA",),
    driver=(550, 54),
    cuda_runtime=12,
    nodes=frozenset({"nvidia0", "dri"}),
    tools=frozenset({"c++", "nvcc", "nvidia-smi"}),
)
LOST = replace(CARD, devices=(CPU,))


def test_nothing_stands_in_the_way_of_a_sound_machine() -> None:
    for system in (SOUND, CARD, replace(SOUND, platform="darwin", backends=("MTL", "CPU"), devices=(CPU, CUDA0))):
        assert examine(system) == []


@pytest.mark.parametrize(
    ("system", "probe", "severity", "says", "command"),
    [
        (replace(SOUND, failure="its process ended (SIGSEGV)"), "llama.cpp", "error", "SIGSEGV", "--force-reinstall"),
        (replace(CARD, backends=("CPU",)), "gpu-backend", "warning", "NVIDIA", 'CMAKE_ARGS="-DGGML_CUDA=ON'),
        (
            replace(CARD, backends=("CPU",), devices=(CPU,), tools=frozenset()),
            "gpu-backend",
            "warning",
            "no GPU backend",
            "sudo apt install nvidia-cuda-toolkit && sudo apt install build-essential && CMAKE_ARGS=",
        ),
        (
            replace(SOUND, gpus=("AMD",), distribution=("fedora",)),
            "gpu-backend",
            "warning",
            "AMD",
            'sudo dnf install glslc vulkan-loader-devel spirv-headers-devel && CMAKE_ARGS="-DGGML_VULKAN=ON',
        ),
        (replace(SOUND, platform="win32", gpus=("Intel",)), "gpu-backend", "warning", "Intel", "$env:CMAKE_ARGS ="),
        (
            replace(SOUND, gpus=("Intel",), distribution=("ubuntu", "debian"), release=(22, 4)),
            "gpu-backend",
            "warning",
            "Intel",
            'https://github.com/KhronosGroup/Vulkan-Headers && CMAKE_ARGS="-DGGML_VULKAN=ON -DVulkan_INCLUDE_DIR=$',
        ),
        (
            replace(SOUND, gpus=("Intel",), distribution=("debian",), release=(13,)),
            "gpu-backend",
            "warning",
            "Intel",
            'sudo apt install glslc libvulkan-dev spirv-headers && CMAKE_ARGS="-DGGML_VULKAN=ON -DGGML_RPC=ON"',
        ),
        (
            replace(SOUND, backends=("Vulkan", "CPU")),
            "device",
            "warning",
            "Vulkan, which finds no device",
            "vulkaninfo",
        ),
        (
            replace(SOUND, gpus=("AMD",), backend_files=("vulkan",), environment={"GGML_VK_VISIBLE_DEVICES": "5"}),
            "device",
            "error",
            "the backend vulkan of this build does not start here, where GGML_VK_VISIBLE_DEVICES is '5'",
            "unset GGML_VK_VISIBLE_DEVICES",
        ),
        (
            replace(SOUND, gpus=("AMD",), backend_files=("vulkan",)),
            "device",
            "error",
            "does not start here",
            "vulkaninfo --summary",
        ),
        (replace(LOST, gpus=(), driver=(), platform="win32"), "device", "error", "finds no device", "nvidia-smi"),
        (replace(LOST, driver=()), "driver", "error", "not loaded", "sudo apt install nvidia-driver"),
        (
            replace(LOST, driver=(), distribution=("ubuntu", "debian")),
            "driver",
            "error",
            "not loaded",
            "sudo ubuntu-drivers install",
        ),
        (replace(LOST, driver=(470, 10)), "driver", "error", "470.10 is too old", "nvidia-driver"),
        (replace(LOST, cuda_runtime=13), "driver", "error", "needs 580", "nvidia-driver"),
        (
            replace(LOST, container="docker", nodes=frozenset()),
            "container",
            "error",
            "not visible in this container",
            "docker run --gpus all",
        ),
        (
            replace(LOST, driver=(), gpus=(), driver_library=False),
            "driver",
            "warning",
            "nor a GPU by NVIDIA: the CPU computes",
            'CMAKE_ARGS="-DGGML_RPC=ON"',
        ),
        (replace(LOST, driver_library=False), "driver", "error", "(libcuda.so.1) is not here", "apt install libcuda1"),
        (
            replace(LOST, driver_library=False, distribution=("ubuntu", "debian")),
            "driver",
            "error",
            "(libcuda.so.1) is not here",
            "sudo apt install libnvidia-compute-550",
        ),
        (
            replace(LOST, driver_library=False, container="docker"),
            "driver",
            "error",
            "(libcuda.so.1) is not here",
            "NVIDIA_DRIVER_CAPABILITIES=compute",
        ),
        (
            replace(LOST, driver_library=False, driver=(), gpus=(), wsl=True),
            "driver",
            "error",
            "(libcuda.so.1) is not here",
            "export LD_LIBRARY_PATH=/usr/lib/wsl/lib",
        ),
        (
            replace(SOUND, failure="libvulkan.so.1: cannot open shared object file: No such file or directory"),
            "llama.cpp",
            "error",
            "libvulkan.so.1",
            "sudo apt install libvulkan1",
        ),
        (
            replace(LOST, environment={"CUDA_VISIBLE_DEVICES": "-1"}),
            "environment",
            "error",
            "CUDA_VISIBLE_DEVICES is set to '-1'",
            "unset CUDA_VISIBLE_DEVICES",
        ),
        (
            replace(SOUND, gpus=("AMD",), backends=("ROCm", "CPU"), nodes=frozenset({"kfd!"})),
            "permission",
            "error",
            "/dev/kfd",
            "sudo usermod -aG render,video",
        ),
        (LOST, "device", "error", "CUDA, which finds no device", "nvidia-smi"),
        (replace(SOUND, cpu_flags=frozenset({"sse2"})), "avx2", "warning", "no AVX2", ""),
        (replace(SOUND, build=frozenset({"SSE3"})), "avx2", "error", "does not use it", "-DGGML_NATIVE=ON"),
        (
            replace(SOUND, memory_available=GB // 2, memory_of_machine=GB // 2),
            "memory",
            "error",
            "used up: 500 MB of 16 GB",
            "ps -eo rss",
        ),
        (
            replace(SOUND, memory_available=3 * GB, memory_of_machine=3 * GB, swap_used=5 * GB),
            "memory",
            "warning",
            "over-committed: 5 GB",
            "ps -eo rss",
        ),
        (
            replace(SOUND, memory_available=2 * GB, memory_limit="control group", container="docker"),
            "memory-limit",
            "warning",
            "leaves 2 GB of memory, where the machine has 12 GB",
            "docker run --memory",
        ),
        (
            replace(SOUND, memory_available=2 * GB, memory_limit="process"),
            "memory-limit",
            "warning",
            "limit of the process",
            "ulimit -v unlimited",
        ),
        (replace(SOUND, model="big", model_bytes=40 * GB), "model", "warning", "big has 40 GB", "handmill fit"),
        (replace(SOUND, disk=Disk("/m", "nfs4")), "disk", "warning", "network", "export HANDMILL_HOME="),
        (replace(SOUND, disk=Disk("/m", "ext4", True, 9e7)), "disk", "warning", "reads 90 MB/s", "HANDMILL_HOME"),
        (replace(SOUND, disk=Disk("/m", "ext4", True)), "disk", "warning", "rotates", "HANDMILL_HOME"),
        (replace(SOUND, on_battery=True), "power", "warning", "battery", ""),
        (replace(SOUND, saves_power=True), "power", "warning", "save power", "cpupower"),
    ],
)
def test_one_thing_is_broken(system: System, probe: str, severity: str, says: str, command: str) -> None:
    (finding,) = examine(system)
    assert (finding.probe, finding.severity) == (probe, severity)
    assert says in finding.message
    assert command in finding.command
    assert bool(command) == bool(finding.command)


def test_what_is_badly_wrong_comes_first_and_every_probe_was_tried() -> None:
    found = examine(replace(LOST, on_battery=True, disk=Disk("/m", "nfs"), build=frozenset()))
    assert [finding.severity for finding in found] == ["error", "error", "warning", "warning"]
    assert len({probe.__name__ for probe in PROBES}) == len(PROBES)


def test_the_command_is_for_this_shell_and_this_python() -> None:
    unix = rebuild_command(SOUND, "-DGGML_CUDA=ON")
    words = shlex.split(unix)
    assert words[0] == "CMAKE_ARGS=-DGGML_CUDA=ON -DGGML_RPC=ON"
    assert words[1:4] == ["/venv/bin/python", "-m", "pip"]
    assert words[-1] == "llama-cpp-python==0.3.36"
    spaced = rebuild_command(replace(SOUND, platform="win32", python="C:\\My Files\\python.exe"))
    assert spaced.startswith('$env:CMAKE_ARGS = "-DGGML_RPC=ON"; "C:\\My Files\\python.exe" -m pip install')


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_what_is_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        tmp_path,
        {
            "etc/os-release": 'NAME="U"\nID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\n',
            ".dockerenv": "",
            "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22\n",
            "proc/cpuinfo": "model name\t: A Processor\nflags\t\t: fpu sse2 avx2\n",
            "proc/meminfo": "MemTotal:  1000 kB\nSwapTotal:  500 kB\nSwapFree:   200 kB\n",
            "proc/version": "Linux version 5.15 (Microsoft)",
            "dev/nvidia0": "",
            "sys/bus/pci/devices/0000:00:02.0/vendor": "0x8086\n",
            "sys/bus/pci/devices/0000:00:02.0/class": "0x030000\n",
            "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
            "sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n",
            "sys/bus/pci/devices/0000:02:00.0/vendor": "0x10de\n",
            "sys/bus/pci/devices/0000:02:00.0/class": "0x040300\n",
            "sys/class/power_supply/BAT0/type": "Battery\n",
            "sys/class/power_supply/BAT0/status": "Discharging\n",
            "sys/class/power_supply/AC/type": "Mains\n",
            "sys/class/power_supply/AC/online": "0\n",
        },
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    system = gather(tmp_path)
    assert system.distribution == ("ubuntu", "debian")
    assert system.release == (24, 4)
    assert (system.container, system.wsl, system.driver) == ("docker", True, (550, 54, 14))
    assert system.gpus == ("NVIDIA",)
    assert "nvidia0" in system.nodes
    assert system.cpu_flags == {"fpu", "sse2", "avx2"}
    assert (system.processor, system.memory_total, system.swap_used) == ("A Processor", 1_024_000, 307_200)
    assert system.on_battery
    assert system.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert "CPU" in system.backends
    assert not system.failure
    write(tmp_path, {"sys/class/power_supply/AC/online": "1\n"})
    assert not gathering._on_battery(tmp_path)


def test_an_empty_file_system_is_no_error(tmp_path: Path) -> None:
    system = gather(tmp_path)
    assert (system.distribution, system.driver, system.gpus, system.on_battery) == ((), (), (), False)


def test_mounts_and_disks(tmp_path: Path) -> None:
    mounts = ["/dev/sda1 / ext4 rw", "server:/x /data/my\\040models nfs4 rw", "/dev/nvme0n1p2 /data ext4 rw"]
    assert gathering._mount(Path("/data/my models/m.gguf"), mounts) == ("server:/x", "nfs4")
    assert gathering._mount(Path("/data/other"), mounts) == ("/dev/nvme0n1p2", "ext4")
    assert gathering._mount(Path("/database"), mounts) == ("/dev/sda1", "ext4")
    model = tmp_path / "m.gguf"
    model.write_bytes(bytes(3_000_000))
    where = tmp_path.resolve().as_posix()
    write(tmp_path, {"proc/mounts": f"/dev/sdb3 {where} ext4 rw 0 0\n", "sys/block/sdb/queue/rotational": "1\n"})
    disk = gathering._disk(tmp_path, model)
    assert disk is not None
    assert (disk.kind, disk.rotates) == ("ext4", True)
    assert disk.bytes_per_second is None or disk.bytes_per_second > 1e6


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gathering, "gather", lambda: SOUND)
    assert cli.main(["doctor"]) == 0
    assert "nothing stands between" in capsys.readouterr().out
    monkeypatch.setattr(gathering, "gather", lambda: replace(SOUND, on_battery=True))
    assert cli.main(["doctor"]) == 0
    monkeypatch.setattr(gathering, "gather", lambda: LOST)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "error: this build has the backend CUDA, which finds no device\n  nvidia-smi\n" in out
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["findings"][0] == vars(Finding("device", "error", found["findings"][0]["message"], "nvidia-smi"))
    assert found["system"]["devices"][0]["name"] == "CPU"
    assert found["system"]["memory_bytes_per_second"] > 0


def test_a_broken_library_is_a_finding(tmp_path: Path) -> None:
    """As where a file of llama.cpp is missing: the process that asks it ends, and this one says so."""
    script = "from runner.system import gather; from runner.doctor import examine; s = gather()\n"
    script += "print(s.failure); print(examine(s)[0].probe)"
    imports = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"LLAMA_CPP_LIB_PATH": str(tmp_path), "PATH": os.environ["PATH"], "PYTHONPATH": imports},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    failure, probe = done.stdout.splitlines()
    assert failure
    assert probe == "llama.cpp"
