"""Where a model's layers would go and how fast it may be here, without loading it.

The bytes are llama.cpp's own reckoning. Tokens per second are the most that the memory of each device allows, measured
now: what a token reads there, over how fast weights of that type are read. A model on the hub (owner/name[:TYPE]) is
planned from the first bytes of its files, a checkpoint as what it would be converted to. --all ranks the library: what
fits, the fastest first. --tune runs the model for some seconds with other numbers of layers on the GPU, of threads and
of tokens at once, and without flash attention; what is fastest is used from then on, where the options leave it open.

--json prints an object for each model: name, path, bytes, fits, gpu_layers, n_layers, context, kv_type,
tokens_per_second (null where it is not known), tokens_per_second_full (with the context full), reason, notes, advice,
and devices: name, layers, weights, kv, compute and free, in bytes, and link_seconds, what the way to another machine
costs for each token (null where there is none).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from models import library
from models.errors import HandmillError, UsageError
from models.text import human_bytes, printable
from runner.chat.render import json_line
from runner.cli.options import add_load_options, add_output_options, load_options
from runner.cli.resolve import resolve_model, resolved_header

if TYPE_CHECKING:
    from runner.fit import DevicePlan, Fit, Fitter

HELP = "where the layers would go, and how fast it may be"
ORDER = 65
_BAR = 40
_COMMON_TYPES = re.compile(r"Q8_0|Q\d_K(_[SML])?|IQ4_XS|IQ3_[SM]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model, here or on the hub (default: last used)")
    parser.add_argument("--all", action="store_true", help="every model of the library, what fits best first")
    parser.add_argument("--tune", action="store_true", help="run it with other settings, and keep what is fastest")
    add_load_options(parser)
    add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    if args.all and args.model is not None:
        raise UsageError("--all is for the whole library, and a model is named")
    if args.all and args.tune:
        raise UsageError("--tune is for one model")
    from models import native
    from models.gguf_parts import check_model_file
    from runner import rpc
    from runner.fit import Fitter
    from runner.planner import planner
    from runner.tuning import Tuned, tuned_for, with_tuned

    native.set_verbose(args.verbose)
    workers, left_out = rpc.reachable(args.worker)
    endpoints = [*rpc.endpoints(), *workers]
    if args.all:
        with planner(endpoints) as asked:
            _print_ranking(_ranked(args, Fitter(asked, left_out)), as_json=args.json)
        return 0
    if args.tune:
        _tune(args)
    with resolved_header(args.model) as path, planner(endpoints) as asked:
        tuned = tuned_for(path, load_options(args))
        notes = [*left_out, *([f"tuned: {tuned}"] if tuned != Tuned() else [])]
        options = with_tuned(path, load_options(args))
        found = Fitter(asked, notes).fit(check_model_file(path), options, _types())
        if args.json:
            print(json_line(report(found)))
        else:
            _print(found)
    return 0


def _tune(args: argparse.Namespace) -> None:
    from runner.engine.start import load_as_told
    from runner.tuning import tune

    def say(line: str) -> None:
        if not args.quiet:
            print(f"tuning: {line}", file=sys.stderr, flush=True)

    tune(resolve_model(args.model, quiet=args.quiet), load_options(args), load_as_told, say)


def report(found: Fit) -> dict[str, object]:
    """The documented object."""
    placed = found.placement
    k, v = placed.settings.kv_types
    rates = found.tokens_per_second, found.tokens_per_second_full
    return {
        "name": found.gguf.name,
        "path": str(found.gguf.path),
        "bytes": found.gguf.size,
        "fits": found.fits,
        "gpu_layers": placed.gpu_layers,
        "n_layers": placed.n_layers,
        "context": placed.settings.n_ctx,
        "kv_type": k if k == v else f"{k},{v}",
        "tokens_per_second": None if rates[0] is None else round(rates[0], 3),
        "tokens_per_second_full": None if rates[1] is None else round(rates[1], 3),
        "reason": placed.reason,
        "notes": list(found.notes),
        "advice": list(found.advice),
        "devices": [
            {
                "name": plan.device.name,
                "layers": plan.layers,
                "weights": plan.buffers.weights,
                "kv": plan.buffers.kv,
                "compute": plan.buffers.compute,
                "free": plan.device.free,
                "link_seconds": None if plan.link_seconds is None else round(plan.link_seconds, 6),
            }
            for plan in found.devices
        ],
    }


def _types() -> Mapping[str, float]:
    from convert.file_types import FILE_TYPES

    return {name: kind.bits_per_weight for name, kind in FILE_TYPES.items() if _COMMON_TYPES.fullmatch(name)}


def _ranked(args: argparse.Namespace, fitter: Fitter) -> Iterator[tuple[str, Fit | HandmillError]]:
    """Every model of the library: those that fit, the fastest first; those that do not; those that cannot be read."""
    from models.gguf_parts import check_model_file
    from runner.tuning import with_tuned

    found: list[tuple[str, Fit | HandmillError]] = []
    for model in library.list_models():
        try:
            options = with_tuned(model.path, load_options(args))
            found.append((model.name, fitter.fit(check_model_file(model.path), options)))
        except HandmillError as error:
            found.append((model.name, error))

    def rank(entry: tuple[str, Fit | HandmillError]) -> tuple[int, float]:
        fit = entry[1]
        if isinstance(fit, HandmillError):
            return 2, 0.0
        return (0 if fit.fits else 1), -(fit.tokens_per_second or 0.0)

    yield from sorted(found, key=rank)


def _print_ranking(ranking: Iterator[tuple[str, Fit | HandmillError]], *, as_json: bool) -> None:
    from runner.fit import summary

    entries = list(ranking)
    width = max((len(printable(name)) for name, _ in entries), default=0)
    for name, found in entries:
        if as_json:
            facts = {"error": str(found)} if isinstance(found, HandmillError) else report(found)
            print(json_line(facts | {"name": name}))
        elif isinstance(found, HandmillError):
            print(f"{printable(name):<{width}}  {printable(found, 1000)}")
        else:
            size = human_bytes(found.gguf.size)
            print(f"{printable(name):<{width}}  {size:>8}  {summary(found)}; {found.placement}")
    if not entries and not as_json:
        print("The library has no models yet.", file=sys.stderr)


def _print(found: Fit) -> None:
    from runner.fit import summary

    gguf, placed = found.gguf, found.placement
    k, v = placed.settings.kv_types
    print(f"{printable(gguf.name)}, {printable(gguf.file_type)}, {human_bytes(gguf.size)}: {placed}")
    print(f"context {placed.settings.n_ctx}, KV cache {k if k == v else f'{k} and {v}'}\n")
    _print_table(found.devices)
    print(f"\n{summary(found)}")
    for note in found.notes:
        print(f"note: {printable(note, 1000)}")
    if found.advice:
        print("what would change most:")
    for line in found.advice:
        print(f"  {line}")


def _print_table(plans: Sequence[DevicePlan]) -> None:
    print(f"{'device':<8} {'layers':>6} {'weights':>8} {'KV cache':>8} {'compute':>8} {'free':>8}  read at")
    for plan in plans:
        sizes = (plan.buffers.weights, plan.buffers.kv, plan.buffers.compute, plan.device.free)
        columns = " ".join(f"{human_bytes(size):>8}" for size in sizes)
        speed = "" if plan.speed is None else f"  {human_bytes(plan.speed.bytes_per_second)}/s"
        link = "" if plan.link_seconds is None else f", link {1000 * plan.link_seconds:.2g} ms a token"
        print(f"{printable(plan.device.name):<8} {plan.layers:>6} {columns}{speed}{link}")
    print("\n█ weights  ▓ KV cache  ▒ compute  · free")
    for plan in plans:
        print(f"{printable(plan.device.name):<8} {_bar(plan)}")


def _bar(plan: DevicePlan) -> str:
    """What is free of a device, and what of that the model takes; as wide as that needs where it is more."""
    buffers, whole = plan.buffers, max(plan.device.free, plan.buffers.total, 1)
    ends = [buffers.weights, buffers.weights + buffers.kv, buffers.total, whole]
    drawn, bar = 0, ""
    for sign, end in zip("█▓▒·", ends, strict=True):
        column = round(_BAR * end / whole)
        bar += sign * (column - drawn)
        drawn = column
    return bar + (" more than is free" if buffers.total > plan.device.free else "")
