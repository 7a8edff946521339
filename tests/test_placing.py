"""The search for a placement, against a made-up llama.cpp that knows what a header does not tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import LoadError
from models.gguf_file import GgufFile, TensorInfo
from runner import placing
from runner.bandwidth import DeviceSpeed
from runner.devices import Device
from runner.placement import CPU, Buffers, Placement, Settings, Split, read_layers, reckoned
from runner.placement_search import MOST_QUESTIONS
from runner.placing import (
    RESERVE,
    Wish,
    nearest_first,
    place,
    place_with_room_to_spare,
    place_without_asking,
    rooms,
)

MB = 1_000_000
PARTS = ("down", "gate", "up")


def device(free: int, name: str = "RPC0", backend: str = "RPC") -> Device:
    return Device(name, "made up", "gpu", free, free, backend)


def model(*, blocks: int = 8, experts: bool = False, sizes: Sequence[int] = ()) -> GgufFile:
    """Blocks of 4 MB and three matrices of 2 MB; of experts three of 20 MB. An embedding and an output of 30 MB."""
    part, size = ("{}_exps", 20 * MB) if experts else ("{}", 2 * MB)
    tensors = {"token_embd.weight": 30 * MB, "output.weight": 30 * MB}
    for block in range(blocks):
        tensors[f"blk.{block}.attn_q.weight"] = sizes[block] if sizes else 4 * MB
        tensors |= {f"blk.{block}.ffn_{part.format(which)}.weight": size for which in PARTS}
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": blocks,
        "llama.embedding_length": 1024,
        "llama.attention.head_count": 16,
    }
    infos = tuple(TensorInfo(name, (1,), "F16", 0, size) for name, size in tensors.items())
    return GgufFile(Path("x.gguf"), 3, 0, metadata, infos)


class MadeUp:
    """Compute buffers, larger where the output is, and a cache of a share of what the header says."""

    def __init__(self, gguf: GgufFile, compute: int = 3 * MB, output: int = 9 * MB, cache: float = 0.5) -> None:
        self.gguf, self.compute, self.output, self.cache = gguf, compute, output, cache
        self.asked: list[tuple[Split, Settings]] = []

    def __call__(self, split: Split, settings: Settings) -> Mapping[str, Buffers]:
        self.asked.append((split, settings))
        layers = read_layers(self.gguf, settings.kv_types)
        kv = [self.cache * settings.n_ctx * each for each in layers.kv]
        weights, total = reckoned(layers, split, [0] * layers.count), reckoned(layers, split, kv)
        found, last = {}, [name for name, count in split.layers if count][-1:]
        for name, count in split.layers:
            if count:
                compute = self.output if [name] == last else self.compute
                found[name] = Buffers(weights[name], total[name] - weights[name], compute)
        whole = sum(tensor.nbytes for tensor in self.gguf.tensors)
        left_kv = int(sum(kv)) - sum(buffers.kv for buffers in found.values())
        return found | {CPU: Buffers(whole - sum(weights.values()), left_kv, self.compute)}


def wish(n_ctx: int = 1000, **more: Any) -> Wish:
    return Wish(Settings(n_ctx), reserve=0, **more)


def placed(gguf: GgufFile, *free: int, want: Wish | None = None, **made_up: Any) -> tuple[Placement, MadeUp]:
    llama = MadeUp(gguf, **made_up)
    available = [device(size, f"RPC{i}") for i, size in enumerate(free)]
    return place(gguf, available, want or wish(), llama), llama


def test_what_fits_goes_to_the_first_device_and_is_asked_once() -> None:
    plan, llama = placed(model(), 1000 * MB, 1000 * MB)
    assert plan.is_all
    assert dict(plan.split.layers) == {"RPC0": 9, "RPC1": 0}
    assert len(llama.asked) == 1
    assert plan.buffers["RPC0"] == Buffers(110 * MB, 8 * 4096 * 500, 9 * MB)
    assert str(plan) == "9/9 layers on RPC0: all fit the 2 GB free"


def test_as_many_layers_as_fit_and_of_one_more_what_fits() -> None:
    # output 30, compute 9, and 10 MB of weights and 2.048 MB of cache a block
    plan, llama = placed(model(), 39 * MB + 3 * 12_048_000 + 11 * MB)
    assert plan.gpu_layers == 1 + 3 + 1
    assert plan.split.on_cpu == ("blk.4.ffn_up.weight",)
    assert len(llama.asked) <= 5
    plan, _ = placed(model(), 39 * MB + 3 * 12_048_000 + 5 * MB)
    assert plan.gpu_layers == 4
    assert str(plan) == "4/9 layers on RPC0: as many as fit the 80.1 MB free"


def test_nothing_fits() -> None:
    plan, _ = placed(model(), 20 * MB)
    assert plan.gpu_layers == 0
    assert plan.buffers == {CPU: Buffers(140 * MB, 8 * 4096 * 500, 3 * MB)}
    assert str(plan).startswith("0/9 layers on CPU: ")


def test_of_experts_the_last_ones_stay_on_the_cpu_first() -> None:
    gguf = model(experts=True)
    everything = 30 * MB + 8 * (64 * MB + 2_048_000) + 9 * MB
    plan, _ = placed(gguf, everything - 100 * MB)
    assert plan.gpu_layers == plan.n_layers == 9
    assert {name.split(".")[1] for name in plan.split.on_cpu} == {"6", "7"}
    assert len(plan.split.on_cpu) == 5  # 120 MB off are too many: one matrix comes back
    assert "all, with experts of 2 blocks on the CPU" in str(plan)
    plan, _ = placed(gguf, 30 * MB + 5 * 6_048_000 + 9 * MB)
    assert plan.gpu_layers == 6
    assert len(plan.split.on_cpu) == 5 * 3


def test_devices_of_different_size() -> None:
    plan, _ = placed(model(), 60 * MB, 40 * MB, 100 * MB)
    assert plan.is_all
    assert [name for name, _ in plan.split.layers] == ["RPC2", "RPC1", "RPC0"]
    assert dict(plan.split.layers)["RPC0"] == 2
    assert all(plan.buffers[name].total <= size * MB for name, size in (("RPC0", 60), ("RPC1", 40), ("RPC2", 100)))


def test_what_was_asked_for_is_taken() -> None:
    for layers, count in (("all", 9), (0, 0), (3, 3), (99, 9)):
        plan = place_without_asking(model(), [device(0)], wish(gpu_layers=layers))
        assert plan.gpu_layers == count
        assert not plan.buffers
    nowhere = place_without_asking(model(), [], wish(gpu_layers="all"))
    assert nowhere.gpu_layers == 0
    assert "no GPU" in str(nowhere)
    assert (
        str(place_without_asking(model(), [], wish(gpu_layers=0))) == "0/9 layers on CPU: none were asked for on a GPU"
    )
    two = place_without_asking(model(), [device(60 * MB, "A"), device(9 * MB, "B")], wish(gpu_layers=6))
    assert dict(two.split.layers) == {"A": 6, "B": 0}
    plan, llama = placed(model(), 10 * MB, want=wish(gpu_layers=4))
    assert [split for split, _ in llama.asked] == [plan.split]
    assert plan.buffers["RPC0"].weights == 60 * MB


def test_with_room_to_spare_nobody_is_asked() -> None:
    needed = 110 * MB + 8 * 4096 * 1000
    roomy = place_with_room_to_spare(model(), [device(2 * needed, "A"), device(9, "B")], wish())
    assert roomy is not None
    assert roomy.is_all
    assert dict(roomy.split.layers) == {"A": 9, "B": 0}
    for less in (
        place_with_room_to_spare(model(), [device(2 * needed - 2)], wish()),
        place_with_room_to_spare(model(), [device(2 * needed)], wish(vram=needed)),
        place_with_room_to_spare(model(), [device(9 * needed)], wish(gpu_layers=3)),
        place_with_room_to_spare(model(), [], wish()),
    ):
        assert less is None


def test_what_may_be_used_of_a_device() -> None:
    devices = [device(1000 * MB, "RPC0"), device(900 * MB, "CUDA0", "CUDA"), device(100 * MB, "CUDA1", "CUDA")]
    own = placing._BACKEND_BYTES_ELSE
    found = {room.name: room.bytes for room in rooms(devices, Wish(Settings(1)))}
    assert list(found) == ["CUDA0", "CUDA1", "RPC0"]
    assert found == {"CUDA0": 900 * MB - RESERVE - own, "CUDA1": 0, "RPC0": 1000 * MB - RESERVE}
    capped = rooms(devices, Wish(Settings(1), vram=800 * MB, reserve=300 * MB, beside=7))
    assert [room.bytes for room in capped] == [600 * MB - own - 7, 0, 700 * MB - 7]


def test_the_cache_is_made_smaller_only_when_that_is_allowed() -> None:
    gguf = model()
    room = 110 * MB + 9 * MB + 30 * MB  # the cache takes 65.5 MB as f16, 34.8 MB as q8_0
    asked, _ = placed(gguf, room + 6 * MB, want=wish(4000), cache=0.5)
    assert not asked.is_all
    assert asked.settings == Settings(4000)
    assert not asked.notes
    plan, _ = placed(gguf, room + 6 * MB, want=wish(4000, reduce_kv=True), cache=0.5)
    assert plan.is_all
    assert plan.settings == Settings(4000, ("q8_0", "q8_0"))
    assert plan.notes == ("the KV cache is kept as q8_0: as f16 not all would fit",)
    enough, _ = placed(gguf, 1000 * MB, want=wish(4000, reduce_kv=True, reduce_context=True))
    assert enough.settings == Settings(4000)


def test_a_cache_that_cannot_be_smaller_stays() -> None:
    gguf = model()
    llama = MadeUp(gguf)

    def ask(split: Split, settings: Settings) -> Mapping[str, Buffers]:
        if settings.kv_types != ("f16", "f16"):
            raise LoadError("llama.cpp cannot make a context")
        return llama(split, settings)

    plan = place(gguf, [device(130 * MB)], wish(4000, reduce_kv=True), ask)
    assert plan.settings == Settings(4000)
    assert "cannot have it as q8_0" in plan.notes[0]


def test_the_context_is_made_smaller_only_when_that_is_allowed() -> None:
    gguf = model()
    room = 110 * MB + 9 * MB + 8 * 4096 * 10_000 // 2
    plan, llama = placed(gguf, room, want=wish(32_768, reduce_context=True))
    assert plan.is_all
    assert 9_000 <= plan.settings.n_ctx <= 10_000
    assert plan.settings.n_ctx % 256 == 0
    assert plan.notes == (f"context of {plan.settings.n_ctx} tokens in place of 32768: so that all layers fit",)
    assert len(llama.asked) <= 16
    least, _ = placed(gguf, 60 * MB, want=wish(32_768, reduce_context=True))
    assert least.settings.n_ctx == placing.SMALLEST_CONTEXT
    assert 0 < least.gpu_layers < 9
    assert "the least" in least.notes[0]
    small, _ = placed(gguf, 60 * MB, want=wish(1000, reduce_context=True))
    assert small.settings.n_ctx == 1000
    assert not small.notes


def test_buffers_that_only_the_experts_need_keep_nothing_else_away() -> None:
    """With the experts on a device its compute buffer is large, without them small."""
    gguf = model(experts=True)

    class Large(MadeUp):
        def __call__(self, split: Split, settings: Settings) -> Mapping[str, Buffers]:
            found = dict(super().__call__(split, settings))
            if "RPC0" in found and len(split.on_cpu) < 8 * 3:
                found["RPC0"] = replace(found["RPC0"], compute=90 * MB)
            return found

    llama = Large(gguf)
    plan = place(gguf, [device(30 * MB + 8 * 6_048_000 + 10 * MB)], wish(), llama)
    assert plan.gpu_layers == 9
    assert len(plan.split.on_cpu) == 24


@given(
    st.lists(st.integers(0, 120), min_size=1, max_size=3),
    st.booleans(),
    st.lists(st.integers(1, 9), min_size=5, max_size=5),
    st.integers(0, 12),
    st.integers(0, 30),
    st.floats(0, 1.5),
)
def test_whatever_llama_says_it_fits_and_no_more_does(
    free: list[int], experts: bool, sizes: list[int], compute: int, output: int, cache: float
) -> None:
    gguf = model(blocks=5, experts=experts, sizes=[size * MB for size in sizes])
    made_up: dict[str, Any] = {"compute": compute * MB, "output": output * MB, "cache": cache}
    plan, llama = placed(gguf, *(size * MB * (1 + 3 * experts) for size in free), **made_up)
    room = {f"RPC{i}": size * MB * (1 + 3 * experts) for i, size in enumerate(free)}
    assert len(llama.asked) <= 2 * MOST_QUESTIONS + 1
    assert all(plan.buffers[name].total <= room[name] for name in room if name in plan.buffers)
    assert sum(buffers.weights for buffers in plan.buffers.values()) == sum(tensor.nbytes for tensor in gguf.tensors)
    if len(free) == 1 and not plan.is_all and plan.gpu_layers < plan.n_layers:
        more = replace(plan.split, layers=(("RPC0", plan.gpu_layers + 1),))
        assert llama(more, Settings(1000))["RPC0"].total > room["RPC0"]


@pytest.mark.parametrize("missing", [0, 1])
def test_blocks_whose_cache_the_header_does_not_tell(missing: int) -> None:
    """A recurrent state: learned from the first answer."""
    gguf = model()
    bare = replace(gguf, metadata={"general.architecture": "mamba"})
    state = 20 * MB

    def ask(split: Split, settings: Settings) -> Mapping[str, Buffers]:
        count = max(split.gpu_layers - 1, 0)
        on = {"RPC0": Buffers(count * 10 * MB + 30 * MB, count * state, MB)} if split.gpu_layers else {}
        return on | {CPU: Buffers(0, (8 - count) * state, MB)}

    plan = place(bare, [device(31 * MB + 5 * 30 * MB - missing)], wish(), ask)
    whole = plan.gpu_layers - bool(plan.split.on_cpu)
    assert whole == 6 - missing


def test_what_workers_take_for_a_token_decides_which_is_filled_first() -> None:
    gguf = model()
    own, near, far = device(10 * MB, "GPU0", "CUDA"), device(80 * MB, "RPC0"), device(80 * MB, "RPC1")
    small = device(MB, "RPC2")
    slow, fast = DeviceSpeed(4e9, 0.001, 1e8), DeviceSpeed(400e9, 0.001, 1e8)
    distant = DeviceSpeed(400e9, 0.1, 1e8)

    def order(**speeds: DeviceSpeed | None) -> list[str]:
        found = [device for device in (near, own, far, small) if device.name in (*speeds, "GPU0")]
        return [device.name for device in nearest_first(gguf, found, speeds.__getitem__)]

    assert order(RPC0=fast, RPC1=fast) == ["GPU0", "RPC0", "RPC1"]  # as given
    assert order(RPC0=slow, RPC1=fast) == ["GPU0", "RPC1", "RPC0"]
    assert order(RPC0=distant, RPC1=slow) == ["GPU0", "RPC1", "RPC0"]
    assert order(RPC0=None, RPC1=distant) == ["GPU0", "RPC1", "RPC0"]
    assert order(RPC2=fast, RPC0=slow) == ["GPU0", "RPC0", "RPC2"]  # a call for next to nothing
    assert order(RPC2=slow) == ["GPU0", "RPC2"]
