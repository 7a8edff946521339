"""Which devices there are, and why there may be no GPU among them."""

from __future__ import annotations

import shutil
import sys

import pytest

from models.errors import LoadError
from runner import devices, rpc


def test_the_cpu_is_always_there() -> None:
    found = devices.devices()
    cpu = next(device for device in found if device.kind == "cpu")
    assert cpu.name == "CPU"
    assert cpu.total > 0
    assert not cpu.is_gpu
    assert "CPU" in devices.backends()


def fake(kind: devices.Kind, name: str = "X", backend: str = "") -> devices.Device:
    return devices.Device(name, "fake", kind, 1, 2, backend)


def test_integrated_gpus_are_a_second_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [fake("cpu"), fake("igpu", "I"), fake("gpu", "G"), fake("accelerator")]
    monkeypatch.setattr(devices, "devices", lambda: everything)
    assert [device.name for device in devices.offload_devices()] == ["G"]
    everything.pop(2)
    assert [device.name for device in devices.offload_devices()] == ["I"]
    everything.append(fake("gpu", "W", "RPC"))  # another machine's is no reason to leave this one's alone
    assert [device.name for device in devices.offload_devices()] == ["I", "W"]
    everything[1:] = []
    assert devices.offload_devices() == []


@pytest.mark.parametrize(
    ("backends", "nvidia", "nvcc", "says"),
    [
        (["CPU", "RPC"], False, False, "no GPU was found, and this build"),
        (["CPU", "RPC"], True, True, "has no GPU backend; to use a GPU: CMAKE_ARGS="),
        (["CPU", "RPC"], True, False, "to use a GPU: the CUDA toolkit and CMAKE_ARGS="),
        (["CPU", "CUDA"], True, True, "through CUDA, but its driver reports none; `nvidia-smi` shows"),
        (["CPU", "Vulkan"], True, True, "`vulkaninfo --summary` shows"),
    ],
)
def test_one_line_says_why(
    monkeypatch: pytest.MonkeyPatch, backends: list[str], nvidia: bool, nvcc: bool, says: str
) -> None:
    monkeypatch.setattr(devices, "backends", lambda: backends)
    monkeypatch.setattr(devices, "_has_nvidia_gpu", lambda: nvidia)
    monkeypatch.setattr(devices, "gpu_backend_files", list)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/nvcc" if nvcc else None)
    line = devices.why_no_gpu()
    assert line.startswith("CPU only: ")
    assert says in line
    assert "\n" not in line
    # of the release whose layouts are read here, for the Python that runs
    assert ("CMAKE_ARGS" in line) == (f"{sys.executable} -m pip install" in line and "llama-cpp-python==" in line)


def test_a_backend_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "backends", lambda: ["CPU"])
    monkeypatch.setattr(devices, "gpu_backend_files", lambda: ["vulkan"])
    assert "the backend vulkan of this build does not start here" in devices.why_no_gpu()


def test_a_server_that_is_not_there_is_an_error() -> None:
    if "RPC" not in devices.backends():
        pytest.skip("this build has no RPC backend")
    with pytest.raises(LoadError, match=r"127\.0\.0\.1:1"):
        rpc.add_server("127.0.0.1:1")
