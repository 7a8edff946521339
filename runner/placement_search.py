"""The search for a placement: proposals, llama.cpp's answers to them, and what the answers teach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from runner.placement import Buffers, Layers, Settings, Split, fill, reckoned

MOST_QUESTIONS = 16
_TRIES_TO_GROW = 2

Ask = Callable[[Split, Settings], Mapping[str, Buffers]]
"""What llama.cpp says that a placement takes on each device. Raises LoadError where it cannot be."""


@dataclass(frozen=True)
class Room:
    """A device and the bytes of it that may be used."""

    name: str
    bytes: int


def split_of(found: Sequence[Room], counts: Sequence[int], on_cpu: Sequence[str] = ()) -> Split:
    """llama.cpp gives the first device the first layers: the one that is filled first comes last."""
    pairs = [(room.name, count) for room, count in zip(found, counts, strict=True)]
    return Split(tuple(reversed(pairs)), tuple(sorted(on_cpu)))


def best_placement(layers: Layers, settings: Settings, found: Sequence[Room], ask: Ask) -> tuple[Split, Search]:
    """The placement with the most bytes on the devices in `found`, and the search that found it."""
    search = Search(layers, settings, found, ask)
    return search.with_other_order(search.best())


class Search:
    """The placements asked about so far with the same settings, and what their answers taught."""

    def __init__(self, layers: Layers, settings: Settings, found: Sequence[Room], ask: Ask) -> None:
        self.settings = settings
        self._layers, self._rooms, self._ask = layers, found, ask
        self._answers: dict[Split, Mapping[str, Buffers]] = {}
        self._kv: list[float] = [settings.n_ctx * kv for kv in layers.kv]
        self._beyond: dict[str, int] = {}
        """Bytes of a device that the header does not tell, by the last answer."""

    def with_context(self, n_ctx: int) -> Search:
        return Search(self._layers, replace(self.settings, n_ctx=n_ctx), self._rooms, self._ask)

    def with_other_order(self, split: Split) -> tuple[Split, Search]:
        """`split`, or where not all fits several devices, what comes of filling the last one first, if that is more.

        Layers do not divide as the devices' memory does, and which device has the output decides what is left over.
        """
        if len(self._rooms) > 1 and not self.all_fit(split):
            other = Search(self._layers, self.settings, self._rooms[::-1], self._ask)
            if other._placed(turned := other.best()) > self._placed(split):
                return turned, other
        return split, self

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

    def _split(self, counts: Sequence[int], on_cpu: Sequence[str] = ()) -> Split:
        return split_of(self._rooms, counts, on_cpu)

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
                held = self._placed(best)
                larger = [split for split in self._larger(best, room.name) if self._should_fit(split)]
                larger = sorted((s for s in larger if self._placed(s) > held), key=self._placed, reverse=True)
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

        yield from self._shifted(split, device)

    def _shifted(self, split: Split, device: str) -> Iterator[Split]:
        """The first layer of the next device, or a part of it, on `device`; there, in its place, what stayed out."""
        names = [name for name, count in split.layers if count or name == device]
        following = names[names.index(device) + 1 :][:1]
        for other in following:
            block = self._first_layer(split, other)
            layers = tuple((name, n + (name == device) - (name == other)) for name, n in split.layers)
            movable = [name for name, _ in self._layers.movable[block]]
            for kept in range(len(movable) + 1):
                stays = (set(split.on_cpu) - set(movable)) | set(movable[len(movable) - kept :])
                yield self._filled_up(Split(layers, tuple(sorted(stays))), other)

    def _filled_up(self, split: Split, device: str) -> Split:
        """With what of `device` stays on the CPU brought there, as long as it should fit."""
        first = self._first_layer(split, device)
        for index in range(first, first + dict(split.layers)[device]):
            for name, _ in self._layers.movable[index]:
                if name in split.on_cpu:
                    more = replace(split, on_cpu=tuple(other for other in split.on_cpu if other != name))
                    if not self._should_fit(more):
                        return split
                    split = more
        return split

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
