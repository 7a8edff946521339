"""Options that several commands share, checked here, and turned into the types that the engine takes."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from models.errors import HandmillError
from runner.cli import config
from runner.engine.protocol import LoadOptions, Sampling

_KV = "f16, bf16, f32, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl"
_NUMBERS = {
    "repeat_penalty": "make tokens that came before less likely (1: off)",
    "frequency_penalty": "the same, the more often they came (0: off)",
    "presence_penalty": "the same, however often they came (0: off)",
    "penalty_last_n": "tokens that the penalties look back on (64)",
    "dry_multiplier": "make tokens that would repeat a passage less likely (0: off)",
    "dry_base": "how steeply that grows with the passage (1.75)",
    "dry_allowed_length": "tokens of repetition that are free (2)",
    "dry_last_n": "tokens that are looked back on for it (64)",
    "top_n_sigma": "of those within N deviations of the best (0: off)",
    "typical_p": "of those of typical surprise that make up N together (1: off)",
    "xtc_probability": "how often the likeliest are left out (0: off)",
    "xtc_threshold": "those above it, but the last (0.1)",
    "dynatemp_range": "let the temperature vary by so much with how sure the model is (0: off)",
    "dynatemp_exponent": "and how (1)",
    "mirostat": "1 or 2: keep the surprise even, in place of top-k and its kin (0: off)",
    "mirostat_tau": "the surprise it aims at (5)",
    "mirostat_eta": "how fast it learns (0.1)",
}
"""Of `Sampling`, what is set by a number alone."""
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON, one object a line")
    group.add_argument("-q", "--quiet", action="store_true", help="say nothing but the result and errors")
    group.add_argument("-v", "--verbose", action="store_true", help="show llama.cpp's log")


def add_load_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loading")
    group.add_argument(
        "-c",
        "--context",
        type=context,
        metavar="N|auto",
        help="tokens of context (default: as trained, if memory holds it; auto: fewer, if then more fits the GPU)",
    )
    group.add_argument(
        "-g", "--gpu-layers", type=gpu_layers, default="auto", metavar="auto|all|N", help="layers to put on the GPU"
    )
    group.add_argument("--vram", type=size, metavar="SIZE", help="memory to use at most of each GPU, such as 6G")
    group.add_argument("--reserve", type=size, metavar="SIZE", help="memory to leave free on each GPU (256M)")
    group.add_argument(
        "-j", "--threads", type=integer(1), metavar="N", help="threads to compute with (default: physical cores)"
    )
    add_worker_option(group)
    group.add_argument(
        "--kv-type",
        type=kv_types,
        metavar="TYPE[,TYPE]|auto",
        default=("f16", "f16"),
        help=f"K and V of the cache: {_KV}; auto: f16, or q8_0 if then more fits the GPU",
    )
    group.add_argument(
        "--lora",
        type=lora,
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="an adapter; may be repeated",
    )
    group.add_argument(
        "--cache", type=cache_size, metavar="SIZE|off", help="disk for what was computed of long prompts (default 4G)"
    )
    group.add_argument("--draft", type=Path, metavar="FILE", help="a smaller model, of the same tokens, that guesses")
    group.add_argument("--no-speculate", action="store_true", help="never guess tokens from the context")
    group.add_argument(
        "--parse-special", action="store_true", help="let special tokens in what you type be special (unsafe)"
    )


def add_worker_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--worker",
        type=worker,
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="use the devices that `handmill worker` lends there, too; may be repeated",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (default: what the model recommends)")
    group.add_argument("--temperature", type=number(0, 100), metavar="T", help="0 is greedy and repeatable")
    group.add_argument("--top-k", type=integer(0), metavar="K", help="of the K likeliest tokens (0: of all)")
    group.add_argument("--top-p", type=number(0, 1), metavar="P", help="of the likeliest that make up P together")
    group.add_argument(
        "--min-p", type=number(0, 1), metavar="P", help="of those at least P times as likely as the best"
    )
    group.add_argument("--seed", type=integer(0, 2**32 - 2), metavar="N", help="the same seed gives the same reply")
    group.add_argument("--max-tokens", type=integer(1), metavar="N", help="end a reply after N tokens")
    for name, text in _NUMBERS.items():
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, type=_limited(name), metavar="N", help=text)
    group.add_argument("--logit-bias", type=logit_bias, action="append", metavar="TOKEN=BIAS", help="id and bias")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the reply before this; may be repeated")
    group.add_argument("--think", choices=["on", "off"], help="whether a model that can thinks before it answers")
    group.add_argument("--think-budget", type=integer(0), metavar="N", help="have it answer after N tokens of thought")
    group.add_argument("--grammar", type=Path, metavar="FILE", help="GBNF that the reply must follow")
    group.add_argument("--json-schema", type=Path, metavar="FILE", help="JSON schema that the reply must follow")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")


def with_defaults(parser: argparse.ArgumentParser) -> None:
    """Let the person's `config.toml` set defaults, if the command takes options of these. Raises UsageError."""
    shared = argparse.ArgumentParser(add_help=False)
    add_load_options(shared)
    add_sampling_options(shared)
    if "--worker" in parser._option_string_actions:
        config.apply(parser, shared)


def load_options(args: argparse.Namespace) -> LoadOptions:
    return LoadOptions(
        context=args.context,
        gpu_layers=args.gpu_layers,
        threads=args.threads,
        vram=args.vram,
        reserve=args.reserve,
        parse_special=args.parse_special,
        verbose=args.verbose,
        kv_types=args.kv_type,
        loras=tuple(args.lora),
        cache=args.cache,
        speculate=not args.no_speculate,
        workers=tuple(args.worker),
        draft=args.draft,
    )


def sampling(args: argparse.Namespace, recommended: Sampling) -> Sampling:
    """What the person set, and for the rest what the model recommends."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "think_budget", *_NUMBERS)
    given: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.think:
        given["think"] = args.think == "on"
    if args.logit_bias:
        given["logit_bias"] = tuple(args.logit_bias)
    if args.stop:
        given["stop"] = tuple(args.stop)
    if args.grammar or args.json_schema:
        from runner.engine.grammar import grammar_from_files

        given["grammar"] = grammar_from_files(args.grammar, args.json_schema)
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


def _limited(name: str) -> Callable[[str], float]:
    """An argparse type: a number within the limits of a field of `Sampling`."""

    def parse(text: str) -> float:
        from runner.engine.recommended import INTEGERS, LIMITS

        low, high = LIMITS[name]
        return integer(int(low), int(high))(text) if name in INTEGERS else number(low, high)(text)

    return parse


def logit_bias(text: str) -> tuple[int, float]:
    """An argparse type: `TOKEN=BIAS`, such as `1234=-5`."""
    token, found, bias = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no TOKEN=BIAS")
    return integer(0)(token), number(-100, 100)(bias)


def worker(text: str) -> str:
    """An argparse type: `HOST:PORT`, or a host with the usual port."""
    from runner.rpc import DEFAULT_PORT, parse_endpoint

    try:
        host, port = parse_endpoint(text, DEFAULT_PORT)
    except HandmillError as error:
        raise argparse.ArgumentTypeError(f"{error}: {error.hint}") from None
    return f"{host}:{port}"


def context(text: str) -> int | Literal["auto"]:
    """An argparse type: tokens, or `auto`."""
    return "auto" if text == "auto" else integer(1)(text)


def kv_types(text: str) -> tuple[str, str] | Literal["auto"]:
    """An argparse type: the type of the KV cache, or those of K and V apart: `q8_0`, `q8_0,q4_0`; or `auto`."""
    if text == "auto":
        return "auto"
    k, _, v = text.lower().partition(",")
    for kind in (k, v or k):
        if kind not in _KV.split(", "):
            raise argparse.ArgumentTypeError(f"{kind!r} is none of {_KV}")
    return k, v or k


def lora(text: str) -> tuple[Path, float]:
    """An argparse type: an adapter and perhaps its scale: `style.gguf`, `style.gguf:0.5`."""
    path, _, scale = text.rpartition(":")
    try:
        return (Path(path), float(scale)) if path else (Path(text), 1.0)
    except ValueError:  # a colon in the name
        return Path(text), 1.0


def cache_size(text: str) -> int:
    """An argparse type: bytes, or `off`."""
    return 0 if text.lower() == "off" else size(text)


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
