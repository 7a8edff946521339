"""tiktoken's algorithm in a few lines: words by a pattern, bytes merged by the rank of what they make. An oracle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

import tokenizers

_NONE = 1 << 30


def encode_by_rank(ranks: Mapping[bytes, int], pattern: str, lines: Iterable[str]) -> dict[str, list[int]]:
    """Line -> ranks of its tokens."""
    splitter = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    known: dict[str, list[int]] = {}

    def merged(word: str) -> list[int]:
        if word not in known:
            known[word] = _merge(ranks, word.encode())
        return known[word]

    return {line: [i for word, _ in splitter.pre_tokenize_str(line) for i in merged(word)] for line in lines}


def _merge(ranks: Mapping[bytes, int], word: bytes) -> list[int]:
    if word in ranks:
        return [ranks[word]]
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 1:
        rank, at = min((ranks.get(left + right, _NONE), i) for i, (left, right) in enumerate(pairwise(parts)))
        if rank == _NONE:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]
