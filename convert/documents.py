"""tokenizer.json, made of what other forms of byte-level BPE hold: from here on they are read as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from convert.byte_letters import LETTERS

Json = dict[str, Any]

MAX_TOKEN_BYTES = 1024
"""Far above the longest tokens there are (runs of spaces); finding the merges of one takes its length squared."""


def spelled(token: bytes) -> str:
    """A token in the letters of byte-level BPE."""
    return "".join(map(LETTERS.__getitem__, token))


def added_token(content: str, i: int, *, special: bool = True) -> Json:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content, "special": special, **flags}


def byte_level_document(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added: Sequence[Json],
    *,
    pattern: str | None,
    ignore_merges: bool = False,
    normalizer: str | None = None,
) -> Json:
    """`pattern` None: the splitting of GPT-2."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": list(added),
        "normalizer": normalizer and {"type": normalizer},
        "pre_tokenizer": level if pattern is None else {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": dict(vocab),
            "merges": [list(merge) for merge in merges],
        },
    }


def merges_of_ranks(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The merge that makes each token of a tiktoken file: the last one when its bytes are merged by rank.

    A token that is never made has none.
    """
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _merged(ranks, token, rank)
            if len(parts) == 2:
                yield parts[0], parts[1]


def _merged(ranks: Mapping[bytes, int], token: bytes, below: int) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(left + right, below) for left, right in pairwise(parts)]
        best = min(found)
        if best >= below:
            break
        at = found.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def all_merges_of_ranks(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, as transformers and llama.cpp write them for tekken."""
    for token in _by_rank(ranks):
        pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
        known = [(left, right) for left, right in pairs if left in ranks and right in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _by_rank(ranks: Mapping[bytes, int]) -> Iterable[bytes]:
    return sorted(ranks, key=ranks.__getitem__)
