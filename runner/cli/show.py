"""What a model says of itself: metadata, tensors by type, bits per weight, chat template, recommended sampling.

MODEL is a file or something in the library; nothing is fetched or converted. --json prints one object: path, name,
architecture, file_type, bytes, parameters, bits_per_weight, context_length, chat_template, plain_text_turns (whether
the template marks turns with text that anybody can type; null where that cannot be known), sampling, tensors
(type: count, bytes) and metadata (an array as its length).
"""

from __future__ import annotations

import argparse
from collections import Counter

from models.errors import HandmillError
from models.gguf_file import GgufFile, LazyArray
from models.gguf_parts import read_model
from models.text import human_bytes, human_count, printable
from runner.chat.render import json_line
from runner.cli.resolve import resolve_local_model

HELP = "what a model says of itself"
ORDER = 60
_SAMPLING = "general.sampling."
_TEMPLATE_KEY = "tokenizer.chat_template"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a GGUF file or a library name (default: last used)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> int:
    gguf = read_model(resolve_local_model(args.model))
    facts = describe(gguf)
    if args.json:
        print(json_line(facts))
    else:
        _print(gguf, facts)
    return 0


def describe(gguf: GgufFile) -> dict[str, object]:
    """The documented object."""
    counts = Counter(tensor.type for tensor in gguf.tensors)
    metadata = {k: len(v) if isinstance(v, LazyArray) else v for k, v in gguf.metadata.items()}
    return {
        "path": str(gguf.path),
        "name": gguf.name,
        "architecture": gguf.architecture,
        "file_type": gguf.file_type,
        "bytes": gguf.size,
        "parameters": gguf.parameters,
        "bits_per_weight": round(gguf.bits_per_weight, 4),
        "context_length": gguf.context_length,
        "chat_template": gguf.chat_template,
        "plain_text_turns": _plain_text_turns(gguf),
        "sampling": {k.removeprefix(_SAMPLING): v for k, v in metadata.items() if k.startswith(_SAMPLING)},
        "tensors": {kind: {"count": counts[kind], "bytes": n} for kind, n in gguf.bytes_by_type().items()},
        "metadata": metadata,
    }


def _plain_text_turns(gguf: GgufFile) -> bool | None:
    """Whether a message can end its own turn. Which text is a token only llama.cpp knows: it loads the vocabulary."""
    template = gguf.chat_template
    if template is None:
        return None
    from models.native import open_vocabulary
    from runner.prompt import marks_turns_with_plain_text

    try:
        with open_vocabulary(gguf.path) as vocabulary:
            return marks_turns_with_plain_text(template, vocabulary)
    except HandmillError:  # an architecture that this llama.cpp does not know can still be shown
        return None


def _print(gguf: GgufFile, facts: dict[str, object]) -> None:
    context = gguf.context_length
    rows = [
        ("path", printable(gguf.path, 4096)),
        ("name", printable(gguf.name)),
        ("architecture", printable(gguf.architecture)),
        ("file type", f"{gguf.file_type}, {gguf.bits_per_weight:.2f} bits per weight"),
        ("size", f"{human_bytes(gguf.size)}, {human_count(gguf.parameters)} parameters"),
        ("context", f"{context} tokens" if context else "not said"),
        ("template", _template_line(gguf, facts["plain_text_turns"])),
    ]
    sampling = facts["sampling"]
    if isinstance(sampling, dict) and sampling:
        rows.append(("sampling", ", ".join(f"{printable(k)} {printable(v)}" for k, v in sampling.items())))
    for label, text in rows:
        print(f"{label:<13} {text}")
    print("\ntensors")
    counts = Counter(tensor.type for tensor in gguf.tensors)
    for kind, count in gguf.bytes_by_type().items():
        print(f"  {kind:<8} {counts[kind]:>5}  {human_bytes(count):>8}")
    print("\nmetadata")
    for key, value in gguf.metadata.items():
        if key != _TEMPLATE_KEY:
            print(f"  {printable(key)} = {printable(value, 100)}")
    if gguf.chat_template is not None:
        print("\nchat template")
        for line in gguf.chat_template.splitlines():
            print(f"  {printable(line, 10_000)}")


def _template_line(gguf: GgufFile, plain: object) -> str:
    if gguf.chat_template is None:
        return "none: a base model, `handmill run` continues a text"
    if plain:
        return "marks turns with plain text: what is typed can pass for a turn, nothing can prevent it"
    return "marks turns with special tokens" if plain is False else "there is one"
