"""Where a model's layers go: a search that asks llama.cpp about whole placements, a bounded number of times.

All on the devices if they fit. Else, of a mixture of experts, the experts of the last blocks stay on the CPU, as few
as may be; else fewer blocks go there. The header says where to begin. What llama.cpp answers beyond that (compute
buffers, caches that are no plain ones) is learned from each answer and taken into the next proposal, so that two or
three questions are usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from models.errors import LoadError
from models.gguf_file import GgufFile
from models.text import human_bytes
from runner.devices import Device
from runner.placement import (
    MEBIBYTE,
    Buffers,
    GpuLayers,
    Layers,
    Placement,
    Settings,
    Split,
    fill,
    read_layers,
    reckoned,
)

RESERVE = 256 * MEBIBYTE
"""Kept free on each device unless `--reserve` says otherwise: for what other programs take later."""
BACKEND_BYTES: Mapping[str, int] = {"CPU": 0, "RPC": 0}
_BACKEND_BYTES_ELSE = 384 * MEBIBYTE
"""What a backend takes for itself beside the buffers: of a GPU its kernels, streams and workspaces."""
SMALLEST_CONTEXT = 4096
"""Tokens under which `--context auto` does not go."""
REDUCED_KV = ("q8_0", "q8_0")
"""What `--kv-type auto` may come to: half the bytes, and next to no difference in what is generated."""
MOST_QUESTIONS = 16
_CONTEXT_STEPS = 5
_TRIES_TO_GROW = 2

Ask = Callable[[Split, Settings], Mapping[str, Buffers]]
"""What llama.cpp says that a placement takes on each device. Raises LoadError where it cannot be."""


@dataclass(frozen=True)
class Room:
    """A device and the bytes of it that may be used."""

    name: str
    bytes: int


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

    Those of this machine come first, in llama.cpp's order, which is the fastest first; then those of others.
    """
    reserve = RESERVE if wish.reserve is None else wish.reserve
    found = []
    for device in sorted(available, key=lambda device: device.backend == "RPC"):
        own = BACKEND_BYTES.get(device.backend, _BACKEND_BYTES_ELSE)
        room = device.free - reserve if wish.vram is None else min(device.free - reserve, wish.vram)
        found.append(Room(device.name, max(0, room - own - wish.beside)))
    return found


def place_without_asking(gguf: GgufFile, available: Sequence[Device], wish: Wish) -> Placement:
    """The number of layers that was asked for, or none where there is no device; without llama.cpp's bytes."""
    layers, found = read_layers(gguf, wish.settings.kv_types), rooms(available, wish)
    if not found:
        return Placement(Split(), layers.count, wish.settings, "there is no GPU to place them on")
    count = min(wish.gpu_layers, layers.count) if isinstance(wish.gpu_layers, int) else layers.count
    reason = "all were asked for" if wish.gpu_layers == "all" else "as asked for"
    return Placement(forced(layers, wish.settings, found, count), layers.count, wish.settings, reason)


def place(gguf: GgufFile, available: Sequence[Device], wish: Wish, ask: Ask) -> Placement:
    """Decide where the layers go, with llama.cpp's bytes of it. Raises what `ask` raises."""
    if not available or wish.gpu_layers != "auto":
        simple = place_without_asking(gguf, available, wish)
        return replace(simple, buffers=ask(simple.split, simple.settings))
    layers, found = read_layers(gguf, wish.settings.kv_types), rooms(available, wish)
    search = _Search(layers, wish.settings, found, ask)
    split, notes = search.best(), []
    if wish.reduce_kv and not search.all_fit(split):
        smaller = replace(wish.settings, kv_types=REDUCED_KV)
        with_less = _Search(read_layers(gguf, REDUCED_KV), smaller, found, ask)
        try:
            split, search = with_less.best(), with_less
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
    return Placement(split, layers.count, search.settings, search.reason(split, wish), used, tuple(notes))


def forced(layers: Layers, settings: Settings, found: Sequence[Room], count: int) -> Split:
    """`count` layers, whether they fit or not: as the devices have room, and the rest where there is most of it."""
    costs = [weights + settings.n_ctx * kv for weights, kv in zip(layers.weights, layers.kv, strict=True)]
    counts = fill(costs[layers.count - count :], [room.bytes for room in found])
    counts[max(range(len(found)), key=lambda i: found[i].bytes)] += count - sum(counts)
    return _split(found, counts)


def _split(found: Sequence[Room], counts: Sequence[int], on_cpu: Sequence[str] = ()) -> Split:
    """llama.cpp gives the first device the first layers: the one that is filled first comes last."""
    pairs = [(room.name, count) for room, count in zip(found, counts, strict=True)]
    return Split(tuple(reversed(pairs)), tuple(sorted(on_cpu)))


def _with_less_context(search: _Search, split: Split) -> tuple[Split, _Search]:
    """The largest context with which all fits, nearly; else the smallest there may be."""
    low, high = min(SMALLEST_CONTEXT, search.settings.n_ctx), search.settings.n_ctx
    if low == high:
        return split, search
    best_search = search.with_context(low)
    best = best_search.best()
    if not best_search.all_fit(best):
        return best, best_search
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


class _Search:
    """The placements asked about so far with the same settings, and what their answers taught."""

    def __init__(self, layers: Layers, settings: Settings, found: Sequence[Room], ask: Ask) -> None:
        self.settings = settings
        self._layers, self._rooms, self._ask = layers, found, ask
        self._answers: dict[Split, Mapping[str, Buffers]] = {}
        self._kv: list[float] = [settings.n_ctx * kv for kv in layers.kv]
        self._beyond: dict[str, int] = {}
        """Bytes of a device that the header does not tell, by the last answer."""

    def with_context(self, n_ctx: int) -> _Search:
        return _Search(self._layers, replace(self.settings, n_ctx=n_ctx), self._rooms, self._ask)

    def use(self, split: Split) -> Mapping[str, Buffers]:
        """llama.cpp's answer."""
        if split not in self._answers:
            answer = self._answers[split] = self._ask(split, self.settings)
            self._learn(split, answer)
        return self._answers[split]

    def all_fit(self, split: Split) -> bool:
        return split.gpu_layers == self._layers.count and not split.on_cpu

    def best(self, *, only_all: bool = False) -> Split:
        """The placement with the most bytes on the devices that was found to fit; with `only_all`, if all may fit."""
        best = self._split([0] * len(self._rooms))
        proposed = self._split([self._layers.count] + [0] * (len(self._rooms) - 1))
        while proposed.gpu_layers and proposed not in self._answers and len(self._answers) < MOST_QUESTIONS:
            if self._fits(proposed) and self._placed(proposed) > self._placed(best):
                best = proposed
            proposed = next(split for split in self._proposals() if not self._known_too_large(split))
            if only_all and not self.all_fit(proposed):
                return best
            if not proposed.gpu_layers and not best.gpu_layers:  # less may need less beyond what the header tells
                proposed = next((split for split in self._least() if split not in self._answers), proposed)
        return best if self.all_fit(best) else self._grown(best)

    def reason(self, split: Split, wish: Wish) -> str:
        room = sum(room.bytes for room in self._rooms)
        whose = "allowed" if wish.vram is not None else "free"
        if self.all_fit(split):
            return f"all fit the {human_bytes(room)} {whose}"
        if split.gpu_layers == self._layers.count:
            blocks = len({name.split(".")[1] for name in split.on_cpu})
            what = "experts" if self._layers.experts else "feed-forward parts"
            return f"all, with {what} of {blocks} blocks on the CPU: that much fits the {human_bytes(room)} {whose}"
        return f"as many as fit the {human_bytes(room)} {whose}"

    def _split(self, counts: Sequence[int], on_cpu: Sequence[str] = ()) -> Split:
        return _split(self._rooms, counts, on_cpu)

    def _fits(self, split: Split) -> bool:
        used = self.use(split)
        return all(used[room.name].total <= room.bytes for room in self._rooms if room.name in used)

    def _placed(self, split: Split) -> int:
        return sum(reckoned(self._layers, split, self._kv).values())

    def _learn(self, split: Split, answer: Mapping[str, Buffers]) -> None:
        # All of the cache is somewhere: its bytes are known from any placement, if not how they are spread.
        said, header = sum(buffers.kv for buffers in answer.values()), sum(self._kv)
        blocks = max(self._layers.count - 1, 1)
        self._kv = [kv * said / header for kv in self._kv] if header else [said / blocks] * blocks + [0.0]
        expected = reckoned(self._layers, split, self._kv)
        self._beyond |= {name: answer[name].total - expected[name] for name in expected if name in answer}

    def _room_left(self) -> list[int]:
        """For weights and cache; a device that was in no answer yet is taken to need as much beyond them as others."""
        most = max(self._beyond.values(), default=0)
        return [room.bytes - self._beyond.get(room.name, most) for room in self._rooms]

    def _known_too_large(self, split: Split) -> bool:
        return split in self._answers and not self._fits(split)

    def _proposals(self) -> Iterator[Split]:
        """What should fit by all that was learned, the best first, down to nothing."""
        layers, room = self._layers, self._room_left()
        costs = [weights + kv for weights, kv in zip(layers.weights, self._kv, strict=True)]
        on_cpu: list[str] = []
        counts = fill(costs, room)
        if sum(counts) == layers.count:
            yield self._split(counts)
        for index in reversed(range(layers.count - 1 if layers.experts else 0)):  # the experts of one block more
            costs[index] -= sum(size for _, size in layers.movable[index])
            on_cpu += [name for name, _ in layers.movable[index]]
            counts = fill(costs, room)
            if sum(counts) == layers.count:
                yield self._split(counts, on_cpu)
        for count in reversed(range(sum(counts) + 1)):
            first = layers.count - count
            still = [name for movable in layers.movable[first:] for name, _ in movable] if layers.experts else []
            yield self._split(fill(costs[first:], room), still)

    def _least(self) -> Iterator[Split]:
        none = [0] * (len(self._rooms) - 1)
        if self._layers.experts:
            names = [name for movable in self._layers.movable for name, _ in movable]
            yield self._split([self._layers.count, *none], names)
        yield self._split([1, *none])

    def _grown(self, best: Split) -> Split:
        """`best` with what else finds room on each device: one more layer, or of one what a device can take."""
        for room in self._rooms:
            grows = True
            while grows:
                grows = False
                larger = [split for split in self._larger(best, room.name) if self._should_fit(split)]
                larger.sort(key=self._placed, reverse=True)
                for split in larger[:_TRIES_TO_GROW]:
                    if len(self._answers) < MOST_QUESTIONS and split not in self._answers and self._fits(split):
                        best, grows = split, True
                        break
        return best

    def _should_fit(self, split: Split) -> bool:
        expected = reckoned(self._layers, split, self._kv)
        room_left = zip(self._rooms, self._room_left(), strict=True)
        return all(expected[room.name] == 0 or expected[room.name] <= left for room, left in room_left)

    def _larger(self, split: Split, device: str) -> Iterator[Split]:
        """Placements with a little more on `device`."""
        stays = set(split.on_cpu)
        start = self._layers.count - split.gpu_layers
        if start > 0:
            grown = replace(split, layers=tuple((name, n + (name == device)) for name, n in split.layers))
            first = self._first_layer(grown, device)
            movable = [name for name, _ in self._layers.movable[first]]
            for kept in range(len(movable) + 1):
                yield replace(grown, on_cpu=tuple(sorted(stays | set(movable[len(movable) - kept :]))))
        for index in range(start, self._layers.count - 1):
            kept_here = [name for name, _ in self._layers.movable[index] if name in stays]
            if kept_here and self._device_of(split, index) == device:
                for back in range(1, len(kept_here) + 1):
                    yield replace(split, on_cpu=tuple(sorted(stays - set(kept_here[:back]))))
                break

    def _first_layer(self, split: Split, device: str) -> int:
        index = self._layers.count - split.gpu_layers
        for name, count in split.layers:
            if name == device:
                break
            index += count
        return index

    def _device_of(self, split: Split, index: int) -> str:
        end = self._layers.count - split.gpu_layers
        for name, count in split.layers:
            end += count
            if index < end:
                return name
        return ""
