"""Mistral's `tekken.json`: tiktoken's ranks and pattern in one file, after special tokens that take the first ids."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.checkpoint import read_json
from convert.documents import MAX_TOKEN_BYTES, Json, added_token, all_merges_of_ranks, byte_level_document, spelled
from models.errors import TokenizerError

# What a file of version 3 has without listing it (mistral-common, tekken.py, DEPRECATED_SPECIAL_TOKENS).
_FIRST_SPECIAL = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "add_bos_token": True}
"""What tokenizer_config.json would say."""


def read_tekken(path: Path) -> Json:
    """The file `path` as tokenizer.json. Raises TokenizerError."""
    tekken = read_json(path) or {}
    config = tekken.get("config")
    pattern = config.get("pattern") if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(pattern, str):
        raise TokenizerError(f"{path} has no config with a pattern", path=path.parent)
    n_special = _natural(config, "default_num_special_tokens", path)
    n_vocab = _natural(config, "default_vocab_size", path)
    special = _special(tekken.get("special_tokens"), n_special, path)
    ranks = _ranks(tekken.get("vocab"), n_vocab - n_special, path)
    merges = [(spelled(left), spelled(right)) for left, right in all_merges_of_ranks(ranks)]
    vocab = {spelled(token): rank + n_special for token, rank in ranks.items()}
    added = [added_token(text, i) for i, text in enumerate(special)]
    return byte_level_document(vocab, merges, added, pattern=pattern, ignore_merges=True)


def _natural(config: Mapping[str, Any], name: str, path: Path) -> int:
    value = config.get(name)
    if type(value) is not int or not 0 <= value < 2**24:
        raise TokenizerError(f"{path}: its config has no sound {name!r}", path=path.parent)
    return value


def _special(entries: object, n_special: int, path: Path) -> list[str]:
    """Texts of the special tokens by id; those that are not named are called after their number."""
    texts = [f"<SPECIAL_{i}>" for i in range(n_special)]
    if entries is None:
        texts[: len(_FIRST_SPECIAL)] = _FIRST_SPECIAL[:n_special]
        return texts
    for entry in entries if isinstance(entries, list) else [None]:
        rank = entry.get("rank") if isinstance(entry, Mapping) else None
        text = entry.get("token_str") if isinstance(entry, Mapping) else None
        if type(rank) is not int or not 0 <= rank < n_special or not isinstance(text, str) or not text:
            raise TokenizerError(f"{path}: a special token has no text or no sound rank", path=path.parent)
        texts[rank] = text
    return texts


def _ranks(entries: object, n_tokens: int, path: Path) -> dict[bytes, int]:
    """Bytes -> rank of the tokens that the model has: the file may hold more."""
    ranks: dict[bytes, int] = {}
    for number, entry in enumerate(entries[: max(n_tokens, 0)] if isinstance(entries, list) else []):
        encoded = entry.get("token_bytes") if isinstance(entry, Mapping) else None
        try:
            token = base64.b64decode(encoded, validate=True) if isinstance(encoded, str) else b""
        except (binascii.Error, ValueError):
            token = b""
        if not 0 < len(token) <= MAX_TOKEN_BYTES or token in ranks or entry.get("rank") != number:
            raise TokenizerError(f"{path}: token {number} is broken, too long or there twice", path=path.parent)
        ranks[token] = number
    if len(ranks) != n_tokens or not ranks:
        raise TokenizerError(f"{path} has {len(ranks):,} of {n_tokens:,} tokens", path=path.parent)
    return ranks
