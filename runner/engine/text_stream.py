"""Tokens in a row: their bytes as text that never shows half a character, and what two rows share."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Collects the bytes of tokens and gives out whole characters.

    A character may be spread over several tokens: its bytes wait for the rest. Bytes that can no longer become
    a character turn into U+FFFD. Those that wait when a reply is cut short are no part of its text.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        return self._decoder.decode(data)


def text_of(data: bytes) -> str:
    """The text that a stream gives of all of `data`."""
    return TextStream().feed(data)


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` are a beginning of `mark`, and not all of it."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with together."""
    limit = min(len(one), len(other))
    n, step = 0, 256  # whole slices are compared without Python in between
    while n < limit and list(one[n : n + step]) == list(other[n : n + step]):
        n += step
    n = min(n, limit)
    while n < limit and one[n] == other[n]:
        n += 1
    return n
