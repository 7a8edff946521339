"""Where a model's layers go: a search that asks llama.cpp about whole placements, a bounded number of times.

All on the devices if they fit. Else, of a mixture of experts, the experts of the last blocks stay on the CPU, as few
as may be; else fewer blocks go there. The header says where to begin. What llama.cpp answers beyond that (compute
buffers, caches that are no plain ones) is learned from each answer and taken into the next proposal, so that two or
three questions are usual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from models.errors import LoadError
from models.gguf_file import GgufFile
from models.text import human_bytes
from runner.devices import Device
from runner.placement import (
    MEBIBYTE,
    GpuLayers,
    Layers,
    Placement,
    Settings,
    Split,
    bytes_sent,
    fill,
    read_layers,
)
from runner.placement_search import Ask, Room, Search, best_placement, split_of

if TYPE_CHECKING:
    from runner.bandwidth import DeviceSpeed

RESERVE = 256 * MEBIBYTE
"""Kept free on each device unless `--reserve` says otherwise: for what other programs take later."""
BACKEND_BYTES: Mapping[str, int] = {"CPU": 0, "RPC": 0}
_BACKEND_BYTES_ELSE = 384 * MEBIBYTE
"""What a backend takes for itself beside the buffers: of a GPU its kernels, streams and workspaces."""
SMALLEST_CONTEXT = 4096
"""Tokens under which `--context auto` does not go."""
REDUCED_KV = ("q8_0", "q8_0")
"""What `--kv-type auto` may come to: half the bytes, and next to no difference in what is generated."""
_CONTEXT_STEPS = 5
_CLEARLY = 0.8
"""Of two measured times, the share that one is of the other for it to be no accident."""


@dataclass(frozen=True)
class Wish:
    """What a person asked for. With `reduce_kv` and `reduce_context`, what `settings` say may be made less."""

    settings: Settings
    gpu_layers: GpuLayers = "auto"
    vram: int | None = None
    """Bytes of each device that may be used at most."""
    reserve: int | None = None
    """Bytes of each device to leave."""
    beside: int = 0
    """Bytes that are needed on a device beside the model and its context: adapters, a model that drafts."""
    reduce_kv: bool = False
    reduce_context: bool = False


def rooms(available: Sequence[Device], wish: Wish) -> list[Room]:
    """The devices in the order in which they are filled, and what may be used of each.

    Those of this machine come first, in llama.cpp's order, which is the fastest first; then those of others, as given.
    """
    reserve = RESERVE if wish.reserve is None else wish.reserve
    found = []
    for device in sorted(available, key=lambda device: device.backend == "RPC"):
        own = BACKEND_BYTES.get(device.backend, _BACKEND_BYTES_ELSE)
        room = device.free - reserve if wish.vram is None else min(device.free - reserve, wish.vram)
        found.append(Room(device.name, max(0, room - own - wish.beside)))
    return found


def nearest_first(
    gguf: GgufFile, available: Sequence[Device], speed: Callable[[str], DeviceSpeed | None]
) -> list[Device]:
    """The devices in the order in which `rooms` fills them, those of other machines by what they are measured to take.

    That is the time for a token with as much of the model there as the device holds, for each byte of it: so memory,
    bandwidth and the way there all count. Those about equal keep their order. Only where there are several does
    `speed` measure any.
    """
    own = [device for device in available if device.backend != "RPC"]
    others = [device for device in available if device.backend == "RPC"]
    if len(others) < 2:
        return [*own, *others]
    ordered: list[tuple[float, Device]] = []
    weights = sum(tensor.nbytes for tensor in gguf.tensors)
    for device in others:
        measured, held = speed(device.name), max(1, min(device.free, weights))
        cost = measured.seconds_for(held, bytes_sent(gguf, last=False)) / held if measured else float("inf")
        index = next((i for i, (other, _) in enumerate(ordered) if cost < _CLEARLY * other), len(ordered))
        ordered.insert(index, (cost, device))
    return [*own, *(device for _, device in ordered)]


def place_without_asking(gguf: GgufFile, available: Sequence[Device], wish: Wish) -> Placement:
    """The number of layers that was asked for, or none where there is no device; without llama.cpp's bytes."""
    layers, found = read_layers(gguf, wish.settings.kv_types), rooms(available, wish)
    if not found:
        reason = "none were asked for on a GPU" if wish.gpu_layers == 0 else "there is no GPU to place them on"
        return Placement(Split(), layers.count, wish.settings, reason)
    count = min(wish.gpu_layers, layers.count) if isinstance(wish.gpu_layers, int) else layers.count
    reason = "all were asked for" if wish.gpu_layers == "all" else "as asked for"
    return Placement(forced(layers, wish.settings, found, count), layers.count, wish.settings, reason)


def place_with_room_to_spare(gguf: GgufFile, available: Sequence[Device], wish: Wish) -> Placement | None:
    """All on the first device where weights and cache take at most half of its room: then nobody need be asked.

    Compute buffers take less than the other half.
    """
    layers, found = read_layers(gguf, wish.settings.kv_types), rooms(available, wish)
    needed = sum(layers.weights) + wish.settings.n_ctx * sum(layers.kv)
    if wish.gpu_layers != "auto" or not found or needed > found[0].bytes // 2 or not sum(layers.kv):
        return None
    split = split_of(found, [layers.count] + [0] * (len(found) - 1))
    return Placement(split, layers.count, wish.settings, _reason(layers, found, True, split, wish))


def place(gguf: GgufFile, available: Sequence[Device], wish: Wish, ask: Ask) -> Placement:
    """Decide where the layers go, with llama.cpp's bytes of it. Raises what `ask` raises."""
    if not available or wish.gpu_layers != "auto":
        simple = place_without_asking(gguf, available, wish)
        return replace(simple, buffers=ask(simple.split, simple.settings))
    layers, found = read_layers(gguf, wish.settings.kv_types), rooms(available, wish)
    notes: list[str] = []
    split, search = best_placement(layers, wish.settings, found, ask)
    if wish.reduce_kv and not search.all_fit(split):
        smaller = replace(wish.settings, kv_types=REDUCED_KV)
        try:
            split, search = best_placement(read_layers(gguf, REDUCED_KV), smaller, found, ask)
            notes.append(f"the KV cache is kept as {REDUCED_KV[0]}: as {wish.settings.kv_types[0]} not all would fit")
        except LoadError:  # the model's heads or the device cannot have such a cache
            notes.append(f"the KV cache stays as it is: this model cannot have it as {REDUCED_KV[0]}")
    if wish.reduce_context and not search.all_fit(split):
        asked = search.settings.n_ctx
        split, search = _with_less_context(search, split)
        if search.settings.n_ctx < asked:
            reached = "so that all layers fit" if search.all_fit(split) else "the least that `--context auto` takes"
            notes.append(f"context of {search.settings.n_ctx} tokens in place of {asked}: {reached}")
    used = search.use(split)
    return Placement(
        split,
        layers.count,
        search.settings,
        _reason(layers, found, search.all_fit(split), split, wish),
        used,
        tuple(notes),
    )


def forced(layers: Layers, settings: Settings, found: Sequence[Room], count: int) -> Split:
    """`count` layers, whether they fit or not: as the devices have room, and the rest where there is most of it."""
    costs = [weights + settings.n_ctx * kv for weights, kv in zip(layers.weights, layers.kv, strict=True)]
    counts = fill(costs[layers.count - count :], [room.bytes for room in found])
    counts[max(range(len(found)), key=lambda i: found[i].bytes)] += count - sum(counts)
    return split_of(found, counts)


def _with_less_context(search: Search, split: Split) -> tuple[Split, Search]:
    """The largest context with which all fits, nearly; else the smallest there may be."""
    low, high = min(SMALLEST_CONTEXT, search.settings.n_ctx), search.settings.n_ctx
    if low == high:
        return split, search
    best_search = search.with_context(low)
    best = best_search.best()
    if not best_search.all_fit(best):
        return best_search.with_other_order(best)
    for _ in range(_CONTEXT_STEPS):
        middle = (low + high) // 2 // 256 * 256
        if middle <= low:
            break
        trial = search.with_context(middle)
        proposed = trial.best(only_all=True)
        if trial.all_fit(proposed):
            low, best, best_search = middle, proposed, trial
        else:
            high = middle
    return best, best_search


def _reason(layers: Layers, found: Sequence[Room], all_fit: bool, split: Split, wish: Wish) -> str:
    room = f"{human_bytes(sum(room.bytes for room in found))} {'allowed' if wish.vram is not None else 'free'}"
    if all_fit:
        return f"all fit the {room}"
    if split.gpu_layers == layers.count:
        blocks = len({name.split(".")[1] for name in split.on_cpu})
        what = "experts" if layers.experts else "feed-forward parts"
        return f"all, with {what} of {blocks} blocks on the CPU: that much fits the {room}"
    return f"as many as fit the {room}"
