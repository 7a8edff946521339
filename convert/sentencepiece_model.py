"""A SentencePiece `tokenizer.model`, with the tokens that its folder adds to it.

The file is a protocol buffer (sentencepiece_model.proto); the library tells all but which pieces are user-defined and
how the text is normalised, so these are read from the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.checkpoint import MAX_JSON_BYTES, read_json
from convert.vocabulary import TokenizerFiles, TokenType, UnsupportedTokenizer, Vocabulary, too_many_tokens
from models.errors import TokenizerError
from models.text import printable

UNIGRAM, BPE = 1, 2
_MODEL_TYPES = {3: "word", 4: "character"}


@dataclass
class SentencePieceModel:
    """What the file holds. Piece types are numbered as llama.cpp's token types are."""

    processor: Any
    pieces: list[bytes] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    model_type: int = UNIGRAM
    precompiled_charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True


def load_sentencepiece(path: Path) -> SentencePieceModel:
    """The model in file `path`. Raises TokenizerError."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise TokenizerError(f"{path} is larger than {MAX_JSON_BYTES:,} bytes", path=path)
        data = path.read_bytes()
        processor.LoadFromSerializedProto(data)
        model = _parse(data, processor)
    except (RuntimeError, OSError, ValueError, IndexError, struct.error) as error:
        raise TokenizerError(f"{path} is not a SentencePiece model: {printable(error)}", path=path) from error
    if len(model.pieces) != processor.vocab_size():
        raise TokenizerError(f"{path} is not a SentencePiece model: its pieces cannot be counted", path=path)
    if model.model_type not in (UNIGRAM, BPE):
        raise UnsupportedTokenizer(
            f"{path} is a {_MODEL_TYPES.get(model.model_type, '?')} model of SentencePiece; BPE and unigram are read",
            path=path,
        )
    return model


def read_sentencepiece(files: TokenizerFiles, model: SentencePieceModel) -> Vocabulary:
    """As the vocabulary that llama.cpp's converter writes for BPE and unigram alike. Raises TokenizerError."""
    n_vocab, n_pieces, rules = files.n_vocab, len(model.pieces), files.rules
    if n_pieces > n_vocab:
        raise too_many_tokens(files.path, n_pieces, n_vocab)
    tokens, types = files.padding()
    scores = [-10000.0] * n_vocab
    tokens[:n_pieces], types[:n_pieces], scores[:n_pieces] = model.pieces, model.types, model.scores
    for i in range(n_pieces):
        if types[i] == TokenType.USER_DEFINED:
            tokens[i] = tokens[i].replace("▁".encode(), b" ")
        elif types[i] == TokenType.UNUSED:
            tokens[i] = b"[PAD%d]" % i if tokens[i] in (b"", b"\0") else tokens[i]
        if rules.unused_prefix and tokens[i].startswith(rules.unused_prefix.encode()):
            types[i] = TokenType.UNUSED
    for i, piece in enumerate(rules.appended, n_pieces):
        if i < n_vocab:
            tokens[i], types[i], scores[i] = piece.encode(), TokenType.CONTROL, 0.0
    for piece, i in (read_json(files.path / "added_tokens.json") or {}).items():
        if type(i) is int and 0 <= i < n_vocab:
            tokens[i], types[i], scores[i] = piece.encode("utf-8", "replace"), TokenType.USER_DEFINED, -1000.0
    for i, piece, special in _decoder(files) or _added_by_document(files):
        if i < n_vocab:
            tokens[i], types[i] = files.added_token(piece, special)
            scores[i] = -1000.0
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=scores,
        special=files.special,
        add_space_prefix=model.add_dummy_prefix,
    )


def _decoder(files: TokenizerFiles) -> list[tuple[int, str, bool]]:
    """`added_tokens_decoder` of tokenizer_config.json: id, text, whether it is special."""
    decoder = files.config.get("added_tokens_decoder")
    return [
        (int(key), str(entry.get("content", "")), entry.get("special") is True)
        for key, entry in (decoder if isinstance(decoder, dict) else {}).items()
        if key.isascii() and key.isdecimal() and len(key) < 10 and isinstance(entry, dict)
    ]


def _added_by_document(files: TokenizerFiles) -> list[tuple[int, str, bool]]:
    """The same out of tokenizer.json, for a config that lists none."""
    entries = files.document.get("added_tokens")
    return [
        (entry["id"], entry["content"], entry.get("special") is True)
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
        and isinstance(entry.get("content"), str)
        and type(entry.get("id")) is int
        and entry["id"] >= 0
    ]


# The protocol buffer: numbers of fields out of sentencepiece_model.proto


def _parse(data: bytes, processor: Any) -> SentencePieceModel:
    model = SentencePieceModel(processor)
    for number, value in _fields(data):
        if not isinstance(value, bytes):
            continue
        if number == 1:
            piece, score, kind = b"", 0.0, int(TokenType.NORMAL)
            for name, part in _fields(value):
                if name == 1 and isinstance(part, bytes):
                    piece = part
                elif name == 2 and isinstance(part, bytes):
                    (score,) = struct.unpack("<f", part)
                elif name == 3 and isinstance(part, int):
                    kind = int(TokenType(part))
            model.pieces.append(piece)
            model.scores.append(score)
            model.types.append(kind)
        elif number == 2:
            model.model_type = next((n for name, n in _fields(value) if name == 3 and isinstance(n, int)), UNIGRAM)
        elif number == 3:
            for name, part in _fields(value):
                if name == 2 and isinstance(part, bytes):
                    model.precompiled_charsmap = part
                elif name == 3:
                    model.add_dummy_prefix = bool(part)
                elif name == 4:
                    model.remove_extra_whitespaces = bool(part)
    return model


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of every field: an int for a varint, bytes for all else. Raises IndexError, ValueError."""
    at, size = 0, len(data)
    while at < size:
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > size:
            raise ValueError("a field ends beyond the file")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
