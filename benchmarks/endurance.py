"""What stays in memory after a thousand loads, and after a conversation of ten thousand turns.

    python -m benchmarks.endurance [--loads N] [--turns N]

With tiny models of random weights, one of each kind of memory: what leaks does so whatever the size. Prints the
resident memory at ten places of each run, in MB, and ends with 1 if the second half of one grew by more than 2 MB.
What a conversation itself takes, which nothing forgets, is not counted.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from runner import LoadOptions, Message, Sampling
from runner.engine.local import load
from runner.session import ChatSession
from tests.memory_models import KINDS, write_model

_MOST_GROWTH = 2.0
_OPTIONS = LoadOptions(context=512, gpu_layers=0, threads=1, cache=0)
_REPLY = Sampling(temperature=1.0, seed=1, max_tokens=6)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.endurance")
    parser.add_argument("--loads", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=10_000)
    args = parser.parse_args()
    grown = False
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            path = write_model(kind, Path(folder))
            for what, n, runs in (("loads", args.loads, _loads(path)), ("turns", args.turns, _turns(path))):
                sizes = _watched(runs, n)
                print(f"{kind:<10} {n:>6} {what}: {' '.join(f'{size:.1f}' for size in sizes)} MB", flush=True)
                grown |= sizes[-1] - sizes[len(sizes) // 2] > _MOST_GROWTH
    return int(grown)


def _watched(runs: Iterator[list[Message]], n: int) -> list[float]:
    sizes = []
    for i in range(n):
        kept = next(runs)
        if (i + 1) % max(n // 10, 1) == 0:
            gc.collect()
            sizes.append(_resident() - sum(map(_megabytes, kept)))
    return sizes


def _loads(path: Path) -> Iterator[list[Message]]:
    while True:
        with load(path, _OPTIONS) as engine:
            list(engine.generate([5, 6, 7], _REPLY))
        yield []


def _turns(path: Path) -> Iterator[list[Message]]:
    """Turns of one conversation, which outgrows the context again and again; now and then one is taken back."""
    with load(path, _OPTIONS) as engine:
        session = ChatSession(engine, "Be brief.", _REPLY)
        turn = 0
        while True:
            list(session.reply(f"message {turn} of a long conversation"))
            if turn % 7 == 0:
                session.undo()
            turn += 1
            yield session.messages


def _megabytes(message: Message) -> float:
    parts = (message, message.__dict__, message.content, message.tokens, *message.tokens)
    return sum(map(sys.getsizeof, parts)) / 1e6


def _resident() -> float:
    """Megabytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


if __name__ == "__main__":
    sys.exit(main())
