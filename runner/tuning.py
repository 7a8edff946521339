"""What is fastest here is measured: a model is run with one setting changed after the other, and the best is kept.

It is kept for the model's file and this machine, and used by every later load that leaves the settings open. It is
kept only if it is faster than the plan when both are measured in turns.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from models.errors import GenerationError, LoadError
from models.files import write_json
from models.library import home
from runner.engine.protocol import LoadedEngine, LoadOptions
from runner.engine.state_files import model_key

PROMPT, REPLY = 512, 128
"""Tokens of the request whose time is made short."""
_SECONDS = 0.4
"""For one round of one test: a slow model is measured with fewer tokens."""
_GAIN = 0.97
"""What a change must bring the time down to, to be more than noise."""
_TURNS = 3
_BATCHES = (256, 1024, 2048)
_SHARES = (0.75, 0.5, 0.0)
_MOST_KEPT = 200

Load = Callable[[Path, LoadOptions], LoadedEngine]


@dataclass(frozen=True)
class Tuned:
    """Settings of `LoadOptions`; None: as the plan has it."""

    gpu_layers: int | None = None
    threads: int | None = None
    batch_threads: int | None = None
    batch: int | None = None
    flash_attention: bool | None = None

    def __str__(self) -> str:
        said = [f"{name.replace('_', ' ')} {value}" for name, value in asdict(self).items() if value is not None]
        return ", ".join(said).replace("flash attention False", "no flash attention") or "as planned"


def with_tuned(path: Path, options: LoadOptions) -> LoadOptions:
    """`options`, and for what they leave open what was found to be fastest for this model here."""
    return _applied(options, tuned_for(path, options))


def tuned_for(path: Path, options: LoadOptions) -> Tuned:
    """What was found to be fastest for this model here, of what `options` leave open."""
    if not _file().exists():
        return Tuned()
    found = _kept().get(_key(path, options))
    try:
        tuned = _checked(Tuned(**found)) if isinstance(found, dict) else Tuned()
    except TypeError:  # written by another release
        return Tuned()
    return Tuned(**{name: value for name, value in asdict(tuned).items() if getattr(options, name) in (None, "auto")})


def tune(
    path: Path, options: LoadOptions, load: Load, say: Callable[[str], None] = lambda line: None
) -> tuple[Tuned, float]:
    """Find what is fastest, and keep it; with how many times as fast as the plan it is. Raises HandmillError.

    `load` gives an engine with just these options. What was kept before is forgotten.
    """
    plan = replace(options, cache=0, speculate=False)
    with load(path, plan) as engine:
        info = engine.info
        sizes = _sizes(engine)
        best, best_seconds = Tuned(), _seconds(engine, *sizes)
    say(f"as planned: {best_seconds:.2f} s for {PROMPT} tokens read and {REPLY} written")
    at_first, tried = best_seconds, {best}
    for change in _changes(options, info.gpu_layers, info.threads, sizes[0]):
        candidate = _told(replace(best, **change), info.threads)
        if candidate in tried:
            continue
        tried.add(candidate)
        try:
            with load(path, _applied(plan, candidate)) as engine:
                if candidate.gpu_layers is None and engine.info.gpu_layers < info.gpu_layers:
                    continue  # it takes memory that layers had
                seconds = _seconds(engine, *sizes)
        except (LoadError, GenerationError):  # such a cache or batch cannot be had here
            continue
        say(f"{candidate}: {seconds:.2f} s")
        if seconds < best_seconds * _GAIN:
            best, best_seconds = candidate, seconds
    gain = 1.0
    if best != Tuned():
        gain = _gain(path, plan, best, load, sizes)
        if gain * _GAIN < 1:
            best, gain = Tuned(), 1.0
    say(f"kept: {best}" + (f", {gain:.2f} times as fast as planned" if gain > 1 else f" ({at_first:.2f} s)"))
    _keep(_key(path, options), best)
    return best, gain


def _changes(options: LoadOptions, layers: int, threads: int, prompt: int) -> Iterator[dict[str, Any]]:
    """What is tried, each on top of the best so far; nothing that the person has set."""
    if options.gpu_layers == "auto" and layers:
        yield from ({"gpu_layers": int(layers * share)} for share in _SHARES)
    if options.threads is None:
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        counts = dict.fromkeys((max(1, threads // 2), max(1, threads - 1), processors))
        yield from ({"threads": count} for count in counts)
        yield from ({"batch_threads": count} for count in dict.fromkeys([*counts, threads]))
    if options.flash_attention is None:
        yield {"flash_attention": False}
    if options.batch is None:
        yield from ({"batch": batch} for batch in _BATCHES if batch <= prompt)


def _told(tuned: Tuned, threads: int) -> Tuned:
    """The same, without numbers of threads that go without saying; the plan computes with `threads`."""
    told = None if tuned.threads == threads else tuned.threads
    for_prompts = None if tuned.batch_threads == (told or threads) else tuned.batch_threads
    return replace(tuned, threads=told, batch_threads=for_prompts)


def _applied(options: LoadOptions, tuned: Tuned) -> LoadOptions:
    given: dict[str, Any] = {name: value for name, value in asdict(tuned).items() if value is not None}
    return replace(options, **given)


def _sizes(engine: LoadedEngine) -> tuple[int, int]:
    """Tokens of prompt and reply to measure with."""
    room = engine.info.n_ctx // 2
    prompt, reply = _rates(engine, min(64, room), min(8, room), rounds=1)
    return (
        max(16, min(int(prompt * _SECONDS), max(_BATCHES), room)),
        max(8, min(int(reply * _SECONDS), REPLY, room)),
    )


def _seconds(engine: LoadedEngine, prompt: int, reply: int, rounds: int = 2) -> float:
    """What the request takes."""
    reading, writing = _rates(engine, prompt, reply, rounds)
    return PROMPT / reading + REPLY / writing


def _rates(engine: LoadedEngine, prompt: int, reply: int, rounds: int) -> tuple[float, float]:
    found = list(engine.speeds(prompt=prompt, generate=reply, depths=[0], rounds=rounds))
    return found[0].tokens_per_second, found[1].tokens_per_second


def _gain(path: Path, plan: LoadOptions, best: Tuned, load: Load, sizes: tuple[int, int]) -> float:
    """How many times as fast as the plan, in turns, the best of each."""
    seconds: dict[bool, float] = {False: float("inf"), True: float("inf")}
    for turn in range(2 * _TURNS):
        tuned = turn % 2 == 1
        with load(path, _applied(plan, best) if tuned else plan) as engine:
            seconds[tuned] = min(seconds[tuned], _seconds(engine, *sizes))
    return seconds[False] / seconds[True]


def _key(path: Path, options: LoadOptions) -> str:
    """A model's file, this machine, and what of the options changes what is fastest."""
    open_ = (options.context, options.gpu_layers, options.vram, options.reserve, options.kv_types, options.workers)
    facts: Sequence[object] = (version("llama-cpp-python"), platform.node(), os.cpu_count(), _displays(), *open_)
    try:
        return sha256(model_key(path, facts).encode()).hexdigest()[:32]
    except OSError as error:
        raise LoadError(f"{path.name} cannot be read: {error.strerror or error}", path=path) from error


def _displays(folder: Path = Path("/sys/bus/pci/devices")) -> list[str]:
    """The display controllers and accelerators of this machine, by their numbers; nothing where Linux does not say."""
    with suppress(OSError):
        devices = [device for device in sorted(folder.iterdir()) if (device / "class").read_text()[:4] in _DISPLAYS]
        return [(device / "vendor").read_text() + (device / "device").read_text() for device in devices]
    return []


_DISPLAYS = ("0x03", "0x12")


def _file() -> Path:
    return home() / "tuned.json"


def _kept() -> dict[str, object]:
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(_file().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _keep(key: str, tuned: Tuned) -> None:
    kept = {name: value for name, value in _kept().items() if name != key}
    if tuned != Tuned():
        kept[key] = {name: value for name, value in asdict(tuned).items() if value is not None}
    write_json(_file(), dict(list(kept.items())[-_MOST_KEPT:]))


def _checked(tuned: Tuned) -> Tuned:
    """Nothing that a file changed by hand could make dangerous."""
    limits = {"gpu_layers": (0, 10_000), "threads": (1, 1024), "batch_threads": (1, 1024), "batch": (32, 1 << 14)}
    values: dict[str, Any] = {}
    for name, (low, high) in limits.items():
        value = getattr(tuned, name)
        values[name] = value if type(value) is int and low <= value <= high else None
    flash = tuned.flash_attention
    return Tuned(**values, flash_attention=flash if isinstance(flash, bool) else None)
