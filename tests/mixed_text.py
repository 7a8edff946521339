"""Text of many kinds for comparing tokenizers: code and prose of this repository, and lines in many scripts."""

from __future__ import annotations

import itertools
import unicodedata
from functools import cache
from pathlib import Path

from convert.check_texts import CHECK_TEXTS
from convert.search_text import search_texts

_ROOT = Path(__file__).parent.parent


@cache
def mixed_lines(n_bytes: int = 100_000) -> tuple[str, ...]:
    """Lines of at least `n_bytes` in all: a piece of a source file, then a line in another script, and so on."""
    sources = [
        chunk
        for path in [*sorted(_ROOT.glob("*/*.py")), _ROOT / "README.md", _ROOT / "convert" / "README.md"]
        for chunk in chunks(path.read_text(encoding="utf-8"), 700)
        if not has_marks(chunk)
    ]
    scripts = itertools.cycle([*CHECK_TEXTS, *search_texts([], [])])
    lines: list[str] = []
    size = 0
    for source, script in zip(sources, scripts, strict=False):
        lines += [source, script]
        size += len(source.encode()) + len(script.encode())
        if size >= n_bytes:
            return tuple(dict.fromkeys(lines))
    raise AssertionError(f"the repository has but {size} bytes of text")


def chunks(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def has_marks(text: str) -> bool:
    """Whether it has combining marks, on which llama.cpp is known to part: see LIMIT_TEXTS."""
    return any(unicodedata.category(char) in ("Mn", "Mc") for char in text)
