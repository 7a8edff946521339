"""What must hold on any device: on an RPC server of this machine's CPU, and with `-m gpu` on a real GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from models import native
from models.gguf_parts import read_model
from models.isolated import isolation
from runner import devices
from runner.engine import local
from runner.engine.protocol import GenerationChunk, LoadOptions, Message, Sampling
from runner.engine.start import load
from runner.engine.supervised import SupervisedEngine
from runner.placement import Placement, Settings
from runner.placing import _BACKEND_BYTES_ELSE, Wish
from runner.planner import planner
from tests.header_models import write_header
from tests.rpc_server import rpc_server

MB = 1 << 20
GREEDY = Sampling(temperature=0, max_tokens=60, logprobs=2)
MESSAGES = [Message("user", "Explain in three sentences how a water mill works.")]
_NEAR = 0.25
"""Between the log probabilities of the two best tokens: other devices add in another order, and swap such."""


class Loopback:
    """An RPC server; a full one is one that may not take more."""

    @contextmanager
    def options(self, **more: Any) -> Iterator[LoadOptions]:
        with rpc_server() as endpoint:
            yield _options(workers=(endpoint,), **more)

    @contextmanager
    def nearly_full(self, room: int, **more: Any) -> Iterator[LoadOptions]:
        with rpc_server(memory=room) as endpoint:
            yield _options(workers=(endpoint,), **more)


class Gpu:
    """The first GPU of this machine; a full one is one of which another process holds the rest."""

    @contextmanager
    def options(self, **more: Any) -> Iterator[LoadOptions]:
        yield _options(**more)

    @contextmanager
    def nearly_full(self, room: int, **more: Any) -> Iterator[LoadOptions]:
        with isolation() as apart:
            needs_memory_of_its_own(apart.call(devices.devices))
            apart.call(hold_all_but, room)
            yield _options(**more)


Device = Loopback | Gpu


def _options(**more: Any) -> LoadOptions:
    return LoadOptions(context=1024, cache=0, **more)


@pytest.fixture(params=[Loopback, pytest.param(Gpu, marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    if request.param is Loopback and "RPC" not in devices.backends():
        pytest.skip("this build has no RPC backend")
    found: Device = request.param()
    return found


@pytest.fixture(scope="module")
def on_cpu(starter_model: Path) -> list[GenerationChunk]:
    with local.load(starter_model, _options(gpu_layers=0)) as engine:
        return list(engine.chat(MESSAGES, GREEDY))


def needs_memory_of_its_own(found: Sequence[devices.Device]) -> None:
    """Where a GPU has the machine's memory, what is free of it says little of what the GPU holds."""
    gpu = devices.offload_devices(found)[0]
    if any(device.kind == "cpu" and device.total == gpu.total for device in found):
        pytest.skip(f"{gpu.name} has no memory of its own")


_held: list[object] = []
_HELD_AT_LEAST = 16 * MB


def hold_all_but(room: int) -> None:
    """In a process of its own: take the memory of the first GPU, but for `room` bytes."""
    name = devices.offload_devices()[0].name
    base = native.shared_library("ggml-base")
    base.ggml_backend_dev_buffer_type.restype = ctypes.c_void_p
    base.ggml_backend_buft_alloc_buffer.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    base.ggml_backend_buft_alloc_buffer.restype = ctypes.c_void_p
    kind = base.ggml_backend_dev_buffer_type(devices.pointer_of(name))
    while (more := devices.free_memory(name) - room) > _HELD_AT_LEAST:
        buffer = base.ggml_backend_buft_alloc_buffer(kind, min(more, 1 << 30))  # drivers have a largest buffer
        assert buffer
        _held.append(buffer)


def check_same_reply(expected: Sequence[GenerationChunk], found: Sequence[GenerationChunk]) -> None:
    """Token by token, up to one that rounding decides."""
    for right, other in zip(expected, found, strict=False):
        if right.token != other.token:
            assert right.logprobs is not None
            (_, best), (second, next_best) = right.logprobs.top[:2]
            assert best - next_best < _NEAR
            assert other.token == second
            return
    assert len(expected) == len(found)


@pytest.mark.parametrize("layers", ["all", 16, "auto"])
def test_layers_on_a_device_say_what_the_cpu_says(
    device: Device, layers: Any, starter_model: Path, on_cpu: list[GenerationChunk]
) -> None:
    with device.options(gpu_layers=layers) as options, load(starter_model, options) as engine:
        assert engine.info.gpu_layers == (16 if layers == 16 else 31)
        assert engine.info.device != "CPU"
        assert engine.info.notes == ()
        check_same_reply(on_cpu, list(engine.chat(MESSAGES, GREEDY)))


def test_a_cap_holds(device: Device, starter_model: Path, on_cpu: list[GenerationChunk]) -> None:
    cap = 60 * MB + (0 if isinstance(device, Loopback) else _BACKEND_BYTES_ELSE)
    with device.options(vram=cap) as options:
        planned = plan(starter_model, options)
        assert 0 < planned.gpu_layers < 31
        assert all(buffers.total <= cap for name, buffers in planned.buffers.items() if name != "CPU")
        with load(starter_model, options) as engine:
            assert engine.info.gpu_layers == planned.gpu_layers
            assert "as many as fit" in engine.info.notes[-1]
            check_same_reply(on_cpu, list(engine.chat(MESSAGES, GREEDY)))


def test_a_device_that_is_full_gets_less(device: Device, starter_model: Path, on_cpu: list[GenerationChunk]) -> None:
    room = 120 * MB if isinstance(device, Loopback) else _BACKEND_BYTES_ELSE
    with device.nearly_full(room, gpu_layers="all") as options, load(starter_model, options) as engine:
        assert engine.info.gpu_layers < 31
        assert any("tried again" in note for note in engine.info.notes)
        check_same_reply(on_cpu, list(engine.chat(MESSAGES, GREEDY)))


def test_a_process_that_ends_in_a_reply(device: Device, starter_model: Path, on_cpu: list[GenerationChunk]) -> None:
    """As it does where a driver fails: the reply goes on, on a GPU's behalf on the CPU."""
    with device.options(gpu_layers="all") as options, load(starter_model, options) as engine:
        assert isinstance(engine, SupervisedEngine)
        chunks = []
        for chunk in engine.chat(MESSAGES, GREEDY):
            chunks.append(chunk)
            if len(chunks) == 10:
                engine._process.apart.kill()
        assert any("the device was lost" in chunk.notice for chunk in chunks)
        assert engine.info.gpu_layers == 0 or isinstance(device, Loopback)
        check_same_reply(on_cpu, [chunk for chunk in chunks if not chunk.notice])


@pytest.mark.gpu
def test_a_plan_is_what_a_gpu_then_holds(starter_model: Path) -> None:
    """What the backend takes beside the buffers is less than is reserved for it."""
    planned = plan(starter_model, _options())
    name = planned.split.layers[0][0]
    with isolation() as apart:
        needs_memory_of_its_own(apart.call(devices.devices))
        before = apart.call(devices.free_memory, name)
        with load(starter_model, _options()) as engine:
            list(engine.chat(MESSAGES, GREEDY))
            held = before - apart.call(devices.free_memory, name)
    assert planned.buffers[name].total <= held <= planned.buffers[name].total + _BACKEND_BYTES_ELSE


@pytest.mark.gpu
def test_a_model_of_more_than_two_gigabytes_in_two(tmp_path: Path) -> None:
    """The shape of a model of seven billion weights, which are all zero: what a GPU holds of it is all the same."""
    cap = 2_000_000_000
    path = write_header(tmp_path / "7B.gguf", blocks=32, width=4096, feed_forward=11008, heads=32, kv_heads=32)
    assert read_model(path).size > cap
    options = _options(vram=cap)
    name = plan(path, options).split.layers[0][0]
    with isolation() as apart:
        needs_memory_of_its_own(apart.call(devices.devices))
        before = apart.call(devices.free_memory, name)
        with load(path, options) as engine:
            assert 0 < engine.info.gpu_layers < 33
            assert len(list(engine.generate([1, 300], Sampling(temperature=0, max_tokens=2)))) > 0
            held = before - apart.call(devices.free_memory, name)
    assert cap // 2 < held <= cap


def plan(model: Path, options: LoadOptions) -> Placement:
    wish = Wish(Settings(1024), vram=options.vram)
    with planner(options.workers) as asked:
        return asked.place(read_model(model), devices.offload_devices(asked.devices()), wish)
