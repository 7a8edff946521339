"""Unigram tokenizers, out of tokenizer.json or a SentencePiece model: the likeliest pieces of the whole text.

llama.cpp computes these as its `t5` vocabulary, without byte fallback; its converter writes some as a `llama`
vocabulary, which merges pieces instead. Which of the two gives the right ids is tried.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from convert.byte_fallback import begins_with_space
from convert.byte_level import added_tokens
from convert.sentencepiece_model import SentencePieceModel
from convert.vocabulary import TokenizerFiles, TokenType, Vocabulary, too_many_tokens, translated
from models.errors import TokenizerError

_BYTE = re.compile(rb"<0x[0-9A-Fa-f]{2}>")


def sentencepiece_unigram_forms(vocabulary: Vocabulary, model: SentencePieceModel) -> Iterator[Vocabulary]:
    """`vocabulary`, which is the `llama` one, and the `t5` one of the same model."""
    yield vocabulary
    if is_sound_charsmap(model.precompiled_charsmap):
        special = vocabulary.special
        if TokenType.UNKNOWN in vocabulary.types:  # llama.cpp takes token 2 for it
            special = replace(special, ids={"unk": vocabulary.types.index(TokenType.UNKNOWN), **special.ids})
        yield replace(
            vocabulary,
            model="t5",
            special=special,
            add_space_prefix=model.add_dummy_prefix,
            remove_extra_whitespaces=model.remove_extra_whitespaces,
            precompiled_charsmap=model.precompiled_charsmap,
        )


def unigram_forms(files: TokenizerFiles, tokenizer: Any) -> Iterator[Vocabulary]:
    """Out of tokenizer.json. Raises TokenizerError."""
    vocabulary = _read_unigram(files)
    with translated(files.path):
        merged = _ids(tokenizer, "a  b") == _ids(tokenizer, "a b")
    charsmap = _charsmap(files.document.get("normalizer"))
    if is_sound_charsmap(charsmap):
        yield replace(
            vocabulary,
            model="t5",
            add_space_prefix=begins_with_space(files, tokenizer),
            remove_extra_whitespaces=merged,
            precompiled_charsmap=charsmap,
        )
    yield vocabulary


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _read_unigram(files: TokenizerFiles) -> Vocabulary:
    path, model = files.path, files.document["model"]
    tokens, types = files.padding()
    scores = [-10000.0] * files.n_vocab
    if len(model["vocab"]) > files.n_vocab:
        raise too_many_tokens(path, len(model["vocab"]), files.n_vocab)
    for i, entry in enumerate(model["vocab"]):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise TokenizerError(f"{path / 'tokenizer.json'}: a piece is no text with a score", path=path)
        tokens[i], types[i], scores[i] = entry[0].encode(), TokenType.NORMAL, _score(entry[1])
        if _BYTE.fullmatch(tokens[i]):
            types[i] = TokenType.BYTE
    flags = added_tokens(files)
    for entry in files.document.get("added_tokens") or []:
        i = entry.get("id")
        if type(i) is int and 0 <= i < files.n_vocab:
            tokens[i], types[i] = files.added_token(entry["content"], flags[entry["content"]]["special"])
    unknown = model.get("unk_id")
    if type(unknown) is int and 0 <= unknown < files.n_vocab:
        types[unknown] = TokenType.UNKNOWN
        files.special.ids.setdefault("unk", unknown)
    return Vocabulary(model="llama", pre="default", tokens=tokens, types=types, scores=scores, special=files.special)


def _score(value: object) -> float:
    if isinstance(value, (int, float)) and abs(value) < 1e30:
        return float(value)
    raise TokenizerError("tokenizer.json: the score of a piece is no number")


def _charsmap(normalizer: object) -> bytes:
    """The table of a `Precompiled` normalizer, alone or in a sequence; b"" without one."""
    if not isinstance(normalizer, Mapping):
        return b""
    steps = normalizer.get("normalizers", [normalizer])
    for step in steps if isinstance(steps, list) else []:
        table = step.get("precompiled_charsmap") if isinstance(step, Mapping) else None
        if isinstance(table, str):
            try:
                return base64.b64decode(table, validate=True)
            except binascii.Error:
                return b""
    return b""


def is_sound_charsmap(data: bytes) -> bool:
    """Whether llama.cpp can walk this table of replacements from its root without leaving it, which would end the
    process. It is a double array of 32-bit nodes and the replacements, each ended by a NUL."""
    import numpy as np

    if not data:
        return True
    size = int.from_bytes(data[:4], "little")
    if size % 4 or size < 4 or size + 4 >= len(data) or data[-1] != 0:
        return False
    nodes = np.frombuffer(data, "<u4", size // 4, 4)
    n_replacements = len(data) - 4 - size
    base = (nodes >> 10) << ((nodes & (1 << 9)) >> 6)
    letters = np.arange(1, 256, dtype=np.uint32)
    seen = np.zeros(len(nodes), bool)
    waiting = [int(base[0])]
    while waiting:
        children = letters ^ np.uint32(waiting.pop())
        if (children >= len(nodes)).any():
            return False
        is_child = (nodes[children] & ((1 << 31) | 0xFF)) == letters
        for child in children[is_child & ~seen[children]].tolist():
            seen[child] = True
            after = child ^ int(base[child])
            if after >= len(nodes):
                return False
            if nodes[child] >> 8 & 1 and nodes[after] & 0x7FFFFFFF >= n_replacements:
                return False
            waiting.append(after)
    return True
