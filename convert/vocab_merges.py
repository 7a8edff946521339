"""`vocab.json` and `merges.txt`, the older form of byte-level BPE (GPT-2, StarCoder, Qwen2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convert.checkpoint import read_json, read_text
from convert.documents import Json, added_token, byte_level_document
from convert.tiktoken_files import QWEN
from convert.vocabulary import UnsupportedTokenizer
from models.errors import TokenizerError
from models.text import printable

END = "<|endoftext|>"
"""The token that ends a text, and for GPT-2 begins one, in every class below that names no other."""

# tokenizer_class -> how it splits a text (None: as GPT-2 does) and normalises it. The files do not say.
_CLASSES: dict[str, tuple[str | None, str | None]] = {
    "GPT2Tokenizer": (None, None),
    "GPT2TokenizerFast": (None, None),
    "CodeGenTokenizer": (None, None),
    "CodeGenTokenizerFast": (None, None),
    "Qwen2Tokenizer": (QWEN, "NFC"),
    "Qwen2TokenizerFast": (QWEN, "NFC"),
}
# Where the config names no class: model_type of config.json.
_MODEL_TYPES = {"gpt2": "GPT2Tokenizer", "gpt_bigcode": "GPT2Tokenizer", "phi": "CodeGenTokenizer"} | dict.fromkeys(
    ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"
)


def read_vocab_merges(path: Path, config: dict[str, Any]) -> Json:
    """Both files of the folder `path` as tokenizer.json. Raises TokenizerError, UnsupportedTokenizer."""
    name = config.get("tokenizer_class") or _MODEL_TYPES.get(
        str((read_json(path / "config.json") or {}).get("model_type"))
    )
    if name not in _CLASSES:
        raise UnsupportedTokenizer(
            f"{path} has vocab.json and merges.txt of a {printable(name or 'tokenizer without a class', 60)}, "
            "whose way of splitting a text is not known",
            hint="Load it with transformers' AutoTokenizer and save it again: that writes tokenizer.json.",
            path=path,
        )
    pattern, normalizer = _CLASSES[name]
    vocab = read_json(path / "vocab.json") or {}
    if not vocab or not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise TokenizerError(f"{path / 'vocab.json'} is no table of tokens and ids", path=path)
    merges, added = _merges(path / "merges.txt"), _added(path, config, vocab)
    return byte_level_document(vocab, merges, added, pattern=pattern, normalizer=normalizer)


def _merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate((read_text(path) or "").split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#")):
            continue
        left, _, right = line.rstrip("\r").partition(" ")
        if not left or not right or " " in right:
            raise TokenizerError(f"{path}: line {number} is no pair of tokens", path=path.parent)
        merges.append((left, right))
    return merges


def _added(path: Path, config: dict[str, Any], vocab: dict[str, Any]) -> list[Json]:
    """Tokens that are found whole: those of added_tokens.json and the config, and those that the config names."""
    added = {
        i: added_token(text, i, special=False)
        for text, i in (read_json(path / "added_tokens.json") or {}).items()
        if type(i) is int and i >= 0
    }
    decoder = config.get("added_tokens_decoder")
    for key, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if key.isascii() and key.isdecimal() and len(key) < 10 and isinstance(entry, dict):
            text = str(entry.get("content", ""))
            added[int(key)] = added_token(text, int(key), special=entry.get("special") is True)
    for name, value in {"end_token": END, **config}.items():
        named = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(named, str) and named in vocab:
            added.setdefault(vocab[named], added_token(named, vocab[named]))
    return list(added.values())
