"""How fast a model reads a prompt (pp) and generates (tg), at several depths of context, and what it takes.

Each number is the median of the rounds. "of memory" is the share of the memory bandwidth, measured here, that the
weights and the cache read for a token come to: near 100% only less to read can be faster.

--json prints one object a test: test (such as pp512 or tg128), depth, threads, batch, tokens_per_second, spread (from
the slowest to the fastest round, as a share), gpu_layers, device, memory_share (tg on a CPU, else null), peak_bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import UsageError
from models.text import human_bytes
from runner.chat.render import json_line
from runner.cli.loading import loaded_engine
from runner.cli.options import add_load_options, add_output_options, integer

if TYPE_CHECKING:
    from runner.bench import Speed
    from runner.engine.protocol import LoadedEngine

HELP = "how fast a model is here"
ORDER = 70


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model (default: the last one used)")
    parser.add_argument("-p", "--prompt", type=integer(0), default=512, metavar="N", help="tokens of prompt (512)")
    parser.add_argument("-n", "--generate", type=integer(0), default=128, metavar="N", help="tokens to generate (128)")
    parser.add_argument(
        "-d", "--depth", type=_depths, default=(0, 1024, 4096), metavar="N,N", help="tokens before (0,1024,4096)"
    )
    parser.add_argument("-r", "--rounds", type=integer(1, 1000), default=5, metavar="N", help="rounds of each (5)")
    parser.add_argument("--plot", type=_picture, metavar="FILE", help="draw speed against depth: FILE.svg or FILE.png")
    add_load_options(parser)
    add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    if not (args.prompt or args.generate):
        raise UsageError("there is nothing to measure", hint="--prompt or --generate takes more than 0 tokens")
    if args.plot:
        from runner.plot import require_matplotlib

        require_matplotlib()
    args.cache = 0
    depths, given = args.depth, args.context
    if given is None:
        args.context = max(depths) + max(args.prompt, args.generate)
    with loaded_engine(args) as engine:
        from runner.bandwidth import memory_bandwidth

        n_ctx = engine.info.n_ctx
        fits = [depth for depth in depths if depth + max(args.prompt, args.generate) <= n_ctx]
        if not fits:
            raise UsageError(f"no test fits the context of {n_ctx} tokens", hint="--depth takes smaller ones")
        bandwidth = None if engine.info.gpu_layers else memory_bandwidth(engine.info.threads)
        if not (args.json or args.quiet):
            _print_head(engine, bandwidth)
        speeds = []
        for speed in engine.speeds(prompt=args.prompt, generate=args.generate, depths=fits, rounds=args.rounds):
            speeds.append(speed)
            share = None if bandwidth is None or not speed.bytes_per_second else speed.bytes_per_second / bandwidth
            _print(speed, share, engine, as_json=args.json)
        if not (args.json or args.quiet) and speeds[-1].peak_bytes:
            print(f"memory at its peak: {human_bytes(speeds[-1].peak_bytes)}")
    if args.plot:
        from runner.plot import plot_speeds

        plot_speeds(speeds, engine.info.name, args.plot)
    return 0


def _print_head(engine: LoadedEngine, bandwidth: float | None) -> None:
    info = engine.info
    speed = "" if bandwidth is None else f", memory read at {human_bytes(bandwidth)}/s"
    print(f"{info.name} ({info.description}) on {info.device}, {info.threads} threads{speed}")
    print(f"{'test':<8} {'depth':>6} {'tok/s':>9} {'spread':>7} {'of memory':>10}")


def _print(speed: Speed, share: float | None, engine: LoadedEngine, *, as_json: bool) -> None:
    if not as_json:
        of_memory = "" if share is None else f"{share:.0%}"
        print(
            f"{speed.test:<8} {speed.depth:>6} {speed.tokens_per_second:>9.1f} {speed.spread:>7.1%} {of_memory:>10}",
            flush=True,
        )
        return
    facts = {
        "test": speed.test,
        "depth": speed.depth,
        "threads": engine.info.threads,
        "batch": engine.info.batch,
        "tokens_per_second": round(speed.tokens_per_second, 3),
        "spread": round(speed.spread, 4),
        "gpu_layers": engine.info.gpu_layers,
        "device": engine.info.device,
        "memory_share": None if share is None else round(share, 4),
        "peak_bytes": speed.peak_bytes,
    }
    print(json_line(facts), flush=True)


def _depths(text: str) -> tuple[int, ...]:
    """An argparse type: numbers of tokens, as `0,1024,4096`."""
    return tuple(sorted({integer(0)(part) for part in text.split(",")}))


def _picture(text: str) -> Path:
    """An argparse type: a file to draw into."""
    path = Path(text)
    if path.suffix.lower() not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .svg or .png")
    return path
