"""One reply on stdout, and nothing else there; statistics on stderr where that is a terminal.

What is piped in is appended to the prompt. A model without a chat template is a base model: it continues the text.
Into a pipe the reply goes as the model gave it; to a terminal, without what a terminal would obey.

What a model thinks before it answers goes to stderr, dimmed, where that is a terminal.

--json prints one object instead: text, thought, finish_reason (stop, length or cancelled), prompt_tokens,
cached_tokens, generated_tokens, thought_tokens (of those generated), drafted_tokens (guessed from the context and
checked together), accepted_tokens (of those, how many came out right), load_seconds, prefill_seconds,
generate_seconds, gpu_layers, device; with --logprobs also logprobs, for each token an object of token (its id),
logprob, and top (a list of the same).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace

from models.errors import UsageError
from models.text import printable
from runner.chat.render import Dimmed, TerminalFilter, json_line
from runner.cli.loading import loaded_engine
from runner.cli.options import add_load_options, add_output_options, add_sampling_options, integer, sampling
from runner.engine.protocol import Engine, GenerationChunk, GenerationStats, Message, ModelInfo

HELP = "one reply on stdout"
ORDER = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a GGUF file, a library name, owner/name[:TYPE] or a checkpoint"
    )
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="what to answer; also read from a pipe")
    parser.add_argument(
        "--logprobs", type=integer(0, 20), metavar="N", help="with --json: each token's log probability and the N best"
    )
    add_sampling_options(parser)
    add_load_options(parser)
    add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    prompt = _prompt(args.prompt)
    with loaded_engine(args) as engine:
        chunks = _reply(engine, prompt, args)
        if not args.quiet:
            chunks = _noting(chunks)
        last = _collect(chunks, engine) if args.json else _stream(chunks, show_thought=not args.quiet)
        if not (args.json or args.quiet) and sys.stderr.isatty():
            print(describe(last.stats, engine.info), file=sys.stderr)
    return 0


def describe(stats: GenerationStats, info: ModelInfo) -> str:
    """The statistics of one reply, in a line."""
    prefill = stats.prompt_tokens - stats.cached_tokens
    rate = prefill / stats.prefill_seconds if stats.prefill_seconds else 0.0
    return (
        f"[{stats.generated_tokens} tokens, {stats.tokens_per_second:.1f} tok/s; "
        f"prompt {stats.prompt_tokens} ({stats.cached_tokens} cached), {rate:.0f} tok/s; "
        f"loaded in {info.load_seconds:.1f} s on {info.device}]"
    )


def _prompt(words: list[str]) -> str:
    """The words of the command line, and below them what was piped in."""
    # What is no UTF-8 on the command line comes as lone surrogates, which nothing further on could encode.
    typed = os.fsencode(" ".join(words)).decode("utf-8", "replace")
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    prompt = "\n\n".join(part for part in (typed, piped.rstrip("\n")) if part)
    if not prompt:
        raise UsageError("there is no prompt", hint="Give one as an argument, or pipe it in.")
    return prompt


def _reply(engine: Engine, prompt: str, args: argparse.Namespace) -> Iterator[GenerationChunk]:
    settings = replace(sampling(args, engine.default_sampling), logprobs=args.logprobs)
    if not engine.has_chat_template:
        left_out = [option for option in ("system", "think", "think_budget") if getattr(args, option) is not None]
        for option in left_out if not args.quiet else ():
            said = f"--{option.replace('_', '-')}"
            print(f"note: a base model has no system prompt and no thoughts; {said} is left out", file=sys.stderr)
        return engine.generate(engine.encode_text(prompt), settings)
    system = [Message("system", args.system)] if args.system else []
    return engine.chat([*system, Message("user", prompt)], settings)


def _noting(chunks: Iterator[GenerationChunk]) -> Iterator[GenerationChunk]:
    for chunk in chunks:
        if chunk.notice:
            print(f"note: {printable(chunk.notice, 1000)}", file=sys.stderr)
        yield chunk


def _stream(chunks: Iterator[GenerationChunk], *, show_thought: bool) -> GenerationChunk:
    """Write the reply as it comes; the last chunk."""
    on_terminal = sys.stdout.isatty()
    terminal = TerminalFilter()
    thoughts = Dimmed(_to_stderr) if show_thought and sys.stderr.isatty() else None
    last = GenerationChunk("", None)
    column_zero = True
    try:
        for last in chunks:
            if thoughts is not None:
                thoughts.feed(last.thought, answer=last.text)
            if text := terminal.feed(last.text) if on_terminal else last.text:
                sys.stdout.write(text)
                sys.stdout.flush()
                column_zero = text.endswith("\n")
    finally:
        if thoughts is not None:
            thoughts.close()
        if on_terminal and not column_zero:
            sys.stdout.write("\n")
    return last


def _to_stderr(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def _collect(chunks: Iterator[GenerationChunk], engine: Engine) -> GenerationChunk:
    last = GenerationChunk("", None)
    pieces, thoughts, logprobs = [], [], []
    for last in chunks:
        pieces.append(last.text)
        thoughts.append(last.thought)
        if last.logprobs is not None:
            top = [{"token": token, "logprob": value} for token, value in last.logprobs.top]
            logprobs.append({"token": last.token, "logprob": last.logprobs.logprob, "top": top})
    facts = report("".join(pieces), "".join(thoughts), last, info=engine.info)
    print(json_line(facts | {"logprobs": logprobs} if logprobs else facts))
    return last


def report(text: str, thought: str, last: GenerationChunk, *, info: ModelInfo) -> dict[str, object]:
    """The documented object of one reply. Times in seconds."""
    stats = last.stats
    return {
        "text": text,
        "thought": thought,
        "finish_reason": last.finish_reason,
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "generated_tokens": stats.generated_tokens,
        "thought_tokens": stats.thought_tokens,
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "load_seconds": round(info.load_seconds, 6),
        "prefill_seconds": round(stats.prefill_seconds, 6),
        "generate_seconds": round(stats.generate_seconds, 6),
        "gpu_layers": info.gpu_layers,
        "device": info.device,
    }
