"""Text of many kinds for comparing tokenizers: code and prose as this repository has them, and lines in many scripts.

The code lies in `mixed_text.txt`, as it was once: tests train tokenizers on it, which no change of ours may change.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

from convert.check_texts import CHECK_TEXTS
from convert.search_text import search_texts

_SOURCES = Path(__file__).with_suffix(".txt")
"""Pieces of source files, with a form feed between one and the next."""


@cache
def mixed_lines(n_bytes: int = 100_000) -> tuple[str, ...]:
    """Lines of at least `n_bytes` in all: a piece of a source file, then a line in another script, and so on."""
    sources = _SOURCES.read_text(encoding="utf-8").split("\f")
    scripts = itertools.cycle([*CHECK_TEXTS, *search_texts([], [])])
    lines: list[str] = []
    size = 0
    for source, script in zip(sources, scripts, strict=False):
        lines += [source, script]
        size += len(source.encode()) + len(script.encode())
        if size >= n_bytes:
            return tuple(dict.fromkeys(lines))
    raise AssertionError(f"there are but {size} bytes of text")
