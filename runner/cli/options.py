"""Options that several commands share, checked here, and turned into the types that the engine takes."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from runner.engine.protocol import LoadOptions, Sampling

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON, one object a line")
    group.add_argument("-q", "--quiet", action="store_true", help="say nothing but the result and errors")
    group.add_argument("-v", "--verbose", action="store_true", help="show llama.cpp's log")


def add_load_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loading")
    group.add_argument("-c", "--context", type=integer(1), metavar="N", help="tokens of context (default: chosen)")
    group.add_argument(
        "-g", "--gpu-layers", type=gpu_layers, default="auto", metavar="auto|all|N", help="layers to put on the GPU"
    )
    group.add_argument("--vram", type=size, metavar="SIZE", help="GPU memory to use at most, such as 6G")
    group.add_argument(
        "-j", "--threads", type=integer(1), metavar="N", help="threads to compute with (default: physical cores)"
    )
    group.add_argument(
        "--parse-special", action="store_true", help="let special tokens in what you type be special (unsafe)"
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (default: what the model recommends)")
    group.add_argument("--temperature", type=number(0, 100), metavar="T", help="0 is greedy and repeatable")
    group.add_argument("--top-k", type=integer(0), metavar="K", help="of the K likeliest tokens (0: of all)")
    group.add_argument("--top-p", type=number(0, 1), metavar="P", help="of the likeliest that make up P together")
    group.add_argument(
        "--min-p", type=number(0, 1), metavar="P", help="of those at least P times as likely as the best"
    )
    group.add_argument("--seed", type=integer(0, 2**32 - 1), metavar="N", help="the same seed gives the same reply")
    group.add_argument("--max-tokens", type=integer(1), metavar="N", help="end a reply after N tokens")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")


def load_options(args: argparse.Namespace) -> LoadOptions:
    return LoadOptions(
        context=args.context,
        gpu_layers=args.gpu_layers,
        threads=args.threads,
        vram=args.vram,
        parse_special=args.parse_special,
        verbose=args.verbose,
    )


def sampling(args: argparse.Namespace, recommended: Sampling) -> Sampling:
    """What the person set, and for the rest what the model recommends."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(recommended, **given)


def integer(lowest: int, highest: int = 2**31 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number from `lowest` to `highest`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"{value} is not between {lowest} and {highest}")
        return value

    return parse


def number(lowest: float, highest: float) -> Callable[[str], float]:
    """An argparse type: a number from `lowest` to `highest`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not (math.isfinite(value) and lowest <= value <= highest):
            raise argparse.ArgumentTypeError(f"{text} is not between {lowest:g} and {highest:g}")
        return value

    return parse


def size(text: str) -> int:
    """An argparse type: bytes, as `6G`, `6GiB`, `512M` or a plain number; the letters are powers of 1024."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 6G or 512M")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def gpu_layers(text: str) -> int | Literal["auto", "all"]:
    """An argparse type: `auto`, `all` or a number of layers."""
    if text == "auto":
        return "auto"
    return "all" if text == "all" else integer(0)(text)
