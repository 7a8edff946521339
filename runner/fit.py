"""Whether a model runs here, where its layers would go, how fast it may be and what would change that; not loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from models.errors import LoadError
from models.gguf_file import GgufFile
from models.text import human_bytes
from runner import devices
from runner.bandwidth import DeviceSpeed
from runner.devices import Device
from runner.engine.choices import choose_context, choose_window, holds_weights, spare_beside, wish_of
from runner.engine.protocol import LoadOptions
from runner.engine.threads import default_threads
from runner.placement import CPU, Buffers, Placement, bytes_per_token, bytes_sent
from runner.placing import Wish
from runner.planner import Planner

_SMALLER_CONTEXTS = (32_768, 16_384, 8192, 4096)
_MOST_ADVICE = 3
_CLEARLY_FASTER = 1.1
"""Times as fast; less may be the measurement's own."""


@dataclass(frozen=True)
class DevicePlan:
    """What of a model is on one device. Bytes; `read` those of weights that one token takes."""

    device: Device
    layers: int
    buffers: Buffers
    read: float
    speed: DeviceSpeed | None
    """None where it could not be measured."""
    sent: int = 0
    """Bytes that cross a network for a token."""

    @property
    def link_seconds(self) -> float | None:
        """What the way to another machine costs for each token; None where there is none, or it is not known."""
        if self.speed is None or not self.speed.link_bytes_per_second:
            return None
        return self.speed.link_seconds(self.sent)


@dataclass(frozen=True)
class Fit:
    """A plan and what follows from it."""

    gguf: GgufFile
    placement: Placement
    devices: tuple[DevicePlan, ...]
    notes: tuple[str, ...]
    advice: tuple[str, ...]
    """What would change most, and what then is: "context 8192: 4 more layers"."""

    @property
    def fits(self) -> bool:
        """Whether every device has the memory, the machine's own among them."""
        return all(plan.buffers.total <= plan.device.free for plan in self.devices)

    @property
    def tokens_per_second(self) -> float | None:
        """At most, when a conversation begins; None where the speed of a device is unknown, or it does not fit."""
        return self._rate(0.0)

    @property
    def tokens_per_second_full(self) -> float | None:
        """At most, when the context is full."""
        return self._rate(1.0)

    def _rate(self, filled: float) -> float | None:
        if not self.fits:
            return None
        seconds = 0.0
        for plan in self.devices:
            if read := plan.read + filled * plan.buffers.kv:
                if plan.speed is None:
                    return None
                seconds += plan.speed.seconds_for(read, plan.sent)
        return 1 / seconds if seconds else None


class Fitter:
    """Plans models on the devices that there are."""

    def __init__(self, asked: Planner, notes: Sequence[str] = ()) -> None:
        self._asked, self._notes = asked, notes
        self._devices = asked.devices()

    def fit(self, gguf: GgufFile, options: LoadOptions, types: Mapping[str, float] | None = None) -> Fit:
        """The plan that a load with `options` would have.

        `types` are file types that the model could have instead, with their bits per weight. Raises LoadError,
        UsageError.
        """
        threads = options.threads or default_threads()
        available = devices.offload_devices(self._devices) if options.gpu_layers != 0 else []
        available = self._asked.in_order(gguf, available, threads)
        n_ctx, chosen = choose_context(gguf, options, offload=bool(available))
        notes = [*self._notes, *chosen]
        wish = wish_of(n_ctx, options)
        placed = self._asked.place(gguf, available, wish, repack=options.repack)
        if not available and options.gpu_layers != 0 and not options.workers:
            notes.append(devices.why_no_gpu())
        placed = self._with_whole_window(gguf, placed, options, spare_beside(gguf, placed, available, wish), notes)
        holds_weights(gguf, placed, notes)
        found = self._planned(gguf, placed, available, threads)
        advice = self._advice(found, available, wish, types or {}, threads)
        return replace(found, notes=(*notes, *placed.notes), advice=advice)

    def _planned(self, gguf: GgufFile, placed: Placement, available: Sequence[Device], threads: int) -> Fit:
        """What a placement means for each device."""
        read, plans = bytes_per_token(gguf, placed.split), []
        for device in [*available, *(device for device in self._devices if device.name == CPU)]:
            buffers = placed.buffers.get(device.name, Buffers())
            layers = dict(placed.split.layers).get(device.name, 0)
            if device.name == CPU:
                layers = placed.n_layers - placed.gpu_layers
            speed = self._asked.speed(device.name, gguf.main_type, threads) if buffers.weights else None
            last = device.name == next((name for name, count in reversed(placed.split.layers) if count), None)
            sent = bytes_sent(gguf, last=last) if device.backend == "RPC" and layers else 0
            plans.append(DevicePlan(device, layers, buffers, read.get(device.name, 0.0), speed, sent))
        return Fit(gguf, placed, tuple(plans), (), ())

    def _with_whole_window(
        self, gguf: GgufFile, placed: Placement, options: LoadOptions, spare: int | None, notes: list[str]
    ) -> Placement:
        """As a load does it: the whole cache is kept where there is memory for it."""
        settings = placed.settings
        whole_window, said = choose_window(gguf, settings.n_ctx, settings.kv_types, spare)
        notes += said
        if not whole_window:
            return placed
        whole = self._asked.account(gguf.path, placed.split, settings, whole_window=True, repack=options.repack)
        return replace(placed, buffers=whole)

    def _advice(
        self, found: Fit, available: Sequence[Device], wish: Wish, types: Mapping[str, float], threads: int
    ) -> tuple[str, ...]:
        placed, advice = found.placement, []
        if available and wish.gpu_layers == "auto":
            advice += self._without(found, available, wish, threads)
            if not placed.is_all:
                advice += self._with_less(found, available, wish)
        if (not found.fits or (available and not placed.is_all)) and (kind := _type_that_fits(found, types)):
            where = "all layers fit the GPU" if available else "it fits the memory"
            advice.insert(0, f"{kind}: {where}")
        return tuple(advice[:_MOST_ADVICE])

    def _without(self, found: Fit, available: Sequence[Device], wish: Wish, threads: int) -> list[str]:
        """Which devices are better left alone: a worker far away, graphics that read no faster than the processor."""
        rate, own = found.tokens_per_second, [device for device in available if device.backend != "RPC"]
        ways = {"without --worker": own} if len(own) < len(available) else {}
        if own:
            ways["--gpu-layers 0"] = []
        for what, fewer in ways.items() if rate else ():
            if dict(found.placement.split.layers).keys() - {device.name for device in fewer}:
                other = self._asked.place(found.gguf, fewer, wish)
                other_rate = self._planned(found.gguf, other, fewer, threads).tokens_per_second
                if rate and other_rate and other_rate > _CLEARLY_FASTER * rate:
                    return [f"{what}: at most {other_rate:.3g} tokens per second"]
        return []

    def _with_less(self, found: Fit, available: Sequence[Device], wish: Wish) -> list[str]:
        """What a smaller cache would bring, the most first; llama.cpp is asked."""
        settings = found.placement.settings
        tried = [(f"context {n}", replace(settings, n_ctx=n)) for n in _SMALLER_CONTEXTS if n < settings.n_ctx]
        if settings.kv_types == ("f16", "f16"):
            tried.append(("--kv-type q8_0", replace(settings, kv_types=("q8_0", "q8_0"))))
        gains: dict[str, tuple[int, str]] = {}
        for what, less in tried:
            try:
                other = self._asked.place(found.gguf, available, replace(wish, settings=less))
            except LoadError as error:
                if error.facts.get("lost"):
                    raise
                continue
            gain, text = _gain(found.placement, other)
            if gain > 0 and not any(text == said for _, said in gains.values()):
                gains[what] = gain, text
        best_first = sorted(gains.items(), key=lambda item: -item[1][0])
        return [f"{what}: {text}" for what, (_, text) in best_first]


def _gain(before: Placement, after: Placement) -> tuple[int, str]:
    """How much more is on devices: layers and matrices that were on the CPU, and that in words."""
    layers, kept = after.gpu_layers - before.gpu_layers, len(before.split.on_cpu) - len(after.split.on_cpu)
    if after.is_all:
        return 1000 * layers + kept, "all layers fit"
    if layers > 0:
        return 1000 * layers + kept, f"{layers} more layer{'s' if layers > 1 else ''}"
    return kept, f"{kept} more matrices of experts"


def _type_that_fits(found: Fit, types: Mapping[str, float]) -> str | None:
    """The largest type under the model's own with which all should fit: weights shrink with the bits, nothing else."""
    bits = found.gguf.bits_per_weight
    weights = sum(tensor.nbytes for tensor in found.gguf.tensors)
    own = [plan for plan in found.devices if plan.device.name == CPU]
    room = sum(plan.device.free for plan in found.devices if plan.device.name != CPU) or own[0].device.free
    beside = sum(plan.buffers.kv + plan.buffers.compute for plan in found.devices)
    for kind, less in sorted(types.items(), key=lambda item: -item[1]):
        if less < bits and weights * less / bits + beside <= room:
            return kind
    return None


def summary(found: Fit) -> str:
    """One line: where, and how fast."""
    if not found.fits:
        short = [plan for plan in found.devices if plan.buffers.total > plan.device.free]
        needs = [(plan.device.name, human_bytes(plan.buffers.total), human_bytes(plan.device.free)) for plan in short]
        return f"does not fit: {'; '.join(f'{name} needs {total} of {free} free' for name, total, free in needs)}"
    rate, full = found.tokens_per_second, found.tokens_per_second_full
    if rate is None:
        return "tokens per second: unknown, since the speed of a device could not be measured"
    return f"at most {rate:.3g} tokens per second" + (f", {full:.3g} with the context full" if full else "")
