"""Unicode normalisation that llama.cpp leaves out."""

from __future__ import annotations

import unicodedata

_NFC_PRE_TOKENIZERS = frozenset(
    {
        "qwen2",
        "qwen35",
        "deepseek-r1-qwen",
        "command-r",
        "falcon",
        "mpt",
        "olmo",
    }
)
"""Values of `tokenizer.ggml.pre` whose Hugging Face tokenizer has an NFC normalizer.

llama.cpp does not normalise: a decomposed "é" (two characters) would reach the model as ids that it has hardly
seen. A GGUF file does not record the normalizer, but the pre-tokenizer's name gives the tokenizer away.
"""


def normalizes(pre_tokenizer: str) -> bool:
    """Whether the tokenizer behind this `tokenizer.ggml.pre` brings text to NFC."""
    return pre_tokenizer in _NFC_PRE_TOKENIZERS


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
