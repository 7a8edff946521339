"""How fast a loaded model reads prompts and generates, at several depths of context."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from models.gguf_file import GgufFile
from models.isolated import announce
from runner import placement
from runner.engine.context import Context
from runner.engine.snapshots import Snapshot

_SIGN_SECONDS = 1.0


@dataclass(frozen=True)
class Speed:
    """One test: `pp512` reads 512 tokens of prompt, `tg128` generates 128, after `depth` tokens of context."""

    test: str
    depth: int
    tokens_per_second: float
    """The median of the rounds."""
    spread: float
    """From the slowest round to the fastest, as a share of the median."""
    bytes_per_second: float | None
    """What generating reads of weights and KV cache; None for a prompt, whose tokens share the weights."""
    peak_bytes: int | None
    """The most memory that the process held until then."""


def measure(
    context: Context, gguf: GgufFile, *, prompt: int, generate: int, depths: Sequence[int], rounds: int
) -> Iterator[Speed]:
    """Each test at each depth, `rounds` times, as it is done. Raises GenerationError."""
    source = random.Random(0)

    def tokens(n: int) -> list[int]:
        return [source.randrange(context.n_vocab) for _ in range(n)]

    # The first computation touches memory that the later ones find ready: llama-bench does not count it either.
    _prefill(context, 0, None, tokens(min(context.batch, max(prompt, 1), context.n_ctx)))
    _generate(context, 0, None, tokens(1))
    for depth in depths:
        context.clear()
        context.extend(tokens(depth))
        start = context.snapshot() if depth and context.needs_checkpoints else None
        if prompt:
            seconds = [_prefill(context, depth, start, tokens(prompt)) for _ in range(rounds)]
            yield _speed(f"pp{prompt}", depth, prompt, seconds)
        if generate:
            seconds = [_generate(context, depth, start, tokens(generate)) for _ in range(rounds)]
            weights = sum(placement.bytes_per_token(gguf, placement.Split()).values())
            read = weights + (depth + generate / 2) * sum(placement.kv_bytes_per_token(gguf))
            yield _speed(f"tg{generate}", depth, generate, seconds, read)


def peak_memory() -> int | None:
    """The most bytes of memory that this process has held, mapped files included; None where nobody says."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _rewind(context: Context, depth: int, start: Snapshot | None) -> None:
    if start is None:
        context.truncate(depth)
    else:
        context.restore(start)


def _prefill(context: Context, depth: int, start: Snapshot | None, tokens: Sequence[int]) -> float:
    _rewind(context, depth, start)
    began = time.perf_counter()
    context.extend(tokens)
    context.logits()  # waits for a GPU
    return time.perf_counter() - began


def _generate(context: Context, depth: int, start: Snapshot | None, tokens: Sequence[int]) -> float:
    """What is picked is not what comes next, so that each round reads the same experts."""
    _rewind(context, depth, start)
    began = said = time.perf_counter()
    for token in tokens:
        context.advance([token], interruptible=True)
        context.logits(0).argmax()
        if time.perf_counter() - said > _SIGN_SECONDS:  # a slow device does not hang
            said = time.perf_counter()
            announce(1)
    return time.perf_counter() - began


def _speed(test: str, depth: int, n: int, seconds: Sequence[float], bytes_each: float | None = None) -> Speed:
    rates = sorted(n / s for s in seconds)
    median = statistics.median(rates)
    read = None if bytes_each is None else bytes_each * median
    return Speed(test, depth, median, (rates[-1] - rates[0]) / median, read, peak_memory())
