"""The letters of byte-level BPE, and the pre-tokenizers that do without."""

from __future__ import annotations

RAW_PRETOKENIZERS = ("gemma4", "granite-embed-multi-311m", "sarvam-moe")
"""Of llama.cpp's BPE pre-tokenizers, those that write a text as it is, a mark for each space, and no byte letters."""


def _letters() -> list[str]:
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in own else chr(next(others)) for byte in range(256)]


LETTERS = _letters()
"""The letter that stands for each byte, as GPT-2 chose them."""

BYTES = {letter: byte for byte, letter in enumerate(LETTERS)}
