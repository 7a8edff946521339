"""Bytes of tokens to text that never shows half a character."""

from __future__ import annotations

import codecs


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
