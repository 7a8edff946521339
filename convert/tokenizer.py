"""A Hugging Face tokenizer as GGUF metadata: tokens, types, scores, merges, special tokens, chat template.

Three kinds are read, whichever the checkpoint holds: a SentencePiece `tokenizer.model`; a byte-level BPE
`tokenizer.json`; a Llama-2 style `tokenizer.json` (BPE with byte fallback). While the tokenizer is in memory it also
answers what the self-check will ask: the ids of a set of texts. Nothing of it outlives `read_vocabulary`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from convert import pretokenizers
from convert.checkpoint import parse_json, read_json, read_text
from convert.special_tokens import SpecialTokens, read_special_tokens
from models.errors import TokenizerError, UnsupportedError
from models.text import printable

# An embedding is often padded to a round number of rows (Qwen2: 271 of 151,936). A gap beyond both of these is
# no padding: the tokenizer belongs to another model.
_PADDING_TOKENS = 1024
_PADDING_SHARE = 0.05


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`, as llama.cpp numbers them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class Vocabulary:
    """What becomes `tokenizer.*` in the file, with the ids that the self-check expects.

    `tokens`, `types` and `scores` (SentencePiece only) have one entry for each row of the embedding.
    `prefix_if_absent`: a space is put before a text unless it begins with one; llama.cpp puts it always.
    """

    model: Literal["gpt2", "llama"]
    pre: str
    tokens: list[bytes]
    types: list[int]
    special: SpecialTokens
    scores: list[float] = field(default_factory=list)
    merges: list[bytes] = field(default_factory=list)
    add_space_prefix: bool | None = None
    expected_ids: dict[str, list[int]] = field(default_factory=dict)
    prefix_if_absent: bool = False


def read_vocabulary(path: Path, n_vocab: int, check_texts: Sequence[str]) -> Vocabulary:
    """Read the tokenizer of the checkpoint at `path`, for an embedding of `n_vocab` rows.

    Raises TokenizerError, UnsupportedError.
    """
    config = read_json(path / "tokenizer_config.json") or {}
    text = read_text(path / "tokenizer.json")
    document = None if text is None else _document(text, path)
    tokenizer = None if text is None else _load_tokenizer(path, text)
    del text
    files = _Files(path, config, document or {}, read_special_tokens(path, document, config), n_vocab)
    if (path / "tokenizer.model").is_file():
        processor = _load_sentencepiece(path)
        vocabulary = _read_sentencepiece(files, processor)
    elif document is None:
        raise _no_tokenizer(path)
    elif _is_byte_level(document, path):
        vocabulary = _read_byte_level_bpe(files, tokenizer)
    else:
        vocabulary = _read_llama_bpe(files)
    vocabulary.prefix_if_absent = vocabulary.model == "llama" and _is_metaspace(document)
    prefix = config.get("add_prefix_space")
    vocabulary.add_space_prefix = prefix if isinstance(prefix, bool) else None
    _check_padding(path, vocabulary, n_vocab)
    for check_text in check_texts:
        if tokenizer is not None:
            with _translated(path):
                ids = tokenizer.encode(check_text, add_special_tokens=False).ids
        else:
            ids = processor.EncodeAsIds(check_text)
        vocabulary.expected_ids[check_text] = list(ids)
    return vocabulary


@dataclass(frozen=True)
class _Files:
    """tokenizer_config.json, tokenizer.json (empty without one), and how many rows of the embedding want a token."""

    path: Path
    config: Mapping[str, Any]
    document: Mapping[str, Any]
    special: SpecialTokens
    n_vocab: int

    def padding(self) -> tuple[list[bytes], list[int]]:
        """Tokens and types of a vocabulary of which nothing is known yet."""
        return [f"[PAD{i}]".encode() for i in range(self.n_vocab)], [int(TokenType.UNUSED)] * self.n_vocab


def _no_tokenizer(path: Path) -> TokenizerError:
    for name in ("tekken.json", "vocab.json", "tokenizer.tiktoken", "qwen.tiktoken"):
        if (path / name).is_file():
            return UnsupportedTokenizer(
                f"{path} has {name} but neither tokenizer.json nor tokenizer.model",
                hint="Load it with transformers' AutoTokenizer and save it again: that writes tokenizer.json.",
                path=path,
            )
    return TokenizerError(
        f"{path} has no tokenizer: neither tokenizer.json nor tokenizer.model",
        hint="Fetch it from the repository of the model.",
        path=path,
    )


class UnsupportedTokenizer(TokenizerError, UnsupportedError):
    """The tokenizer is there, in a form that is not read."""


def _document(text: str, path: Path) -> dict[str, Any]:
    document = parse_json(text, path / "tokenizer.json")
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise TokenizerError(f"{path / 'tokenizer.json'} has no model with a vocabulary", path=path)
    assert isinstance(document, dict)
    return document


def _is_byte_level(document: Mapping[str, Any], path: Path) -> bool:
    """Byte-level BPE, or SentencePiece-like BPE with byte fallback. Raises UnsupportedTokenizer for other kinds."""
    model = document["model"]
    if model.get("type", "BPE") != "BPE" or not isinstance(model["vocab"], dict):
        raise UnsupportedTokenizer(
            f"{path / 'tokenizer.json'} is a {printable(model.get('type', '?'), 40)} tokenizer; BPE is converted",
            path=path,
        )
    return model.get("byte_fallback") is not True


def _is_metaspace(document: Mapping[str, Any] | None) -> bool:
    pre_tokenizer = (document or {}).get("pre_tokenizer")
    return isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "Metaspace"


def _load_tokenizer(path: Path, text: str) -> Any:
    import tokenizers

    with _translated(path):
        return tokenizers.Tokenizer.from_str(text)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Around every call of tokenizers: for a broken file it raises plain Exception, or its Rust code panics."""
    try:
        yield
    except BaseException as error:
        # PanicException is no Exception, and no module exports it
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{path / 'tokenizer.json'} is not a tokenizer: {printable(error)}", path=path) from error


def _read_byte_level_bpe(files: _Files, tokenizer: Any) -> Vocabulary:
    path, document = files.path, files.document
    added = _added_tokens(document, files.config, path)
    tokens, types = files.padding()
    for piece, i in _ids(files).items():
        entry = added.get(piece)
        if entry is None:
            tokens[i], types[i] = piece.encode(), TokenType.NORMAL
            continue
        if not entry["normalized"]:
            # llama.cpp matches the text as it is: give it the form that the tokenizer matches
            with _translated(path):
                encoded = tokenizer.encode(piece, add_special_tokens=False).ids
                piece = tokenizer.decode(encoded, skip_special_tokens=False)
        tokens[i], types[i] = _added_token(piece, entry["special"])
    return Vocabulary(
        model="gpt2",
        pre=_pretokenizer(tokenizer, path),
        tokens=tokens,
        types=types,
        special=files.special,
        merges=_merges(document, path),
    )


def _read_llama_bpe(files: _Files) -> Vocabulary:
    """Llama-2 style BPE as a SentencePiece vocabulary: the score of a token is minus the rank of its merge."""
    path, document = files.path, files.document
    added = _added_tokens(document, files.config, path)
    ranks: dict[bytes, int] = {}
    for rank, merge in enumerate(_merges(document, path)):
        ranks.setdefault(merge.replace(b" ", b"", 1), rank)
    tokens, types = files.padding()
    scores = [-10000.0] * files.n_vocab
    named = files.special.named_tokens
    for piece, i in _ids(files).items():
        entry = added.get(piece)
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
            tokens[i], types[i] = piece.encode(), TokenType.BYTE
        elif entry is not None or piece in named:
            is_special = piece in named or (entry is not None and entry["special"])
            tokens[i], types[i] = _added_token(piece, is_special)
            scores[i] = -1000.0
        else:
            tokens[i], types[i] = piece.encode(), TokenType.NORMAL
            # a token that no merge makes is a single character, or one that BPE never gives
            scores[i] = -float(ranks.get(tokens[i], len(ranks)))
    return Vocabulary(model="llama", pre="default", tokens=tokens, types=types, scores=scores, special=files.special)


def _read_sentencepiece(files: _Files, processor: Any) -> Vocabulary:
    path, n_vocab = files.path, files.n_vocab
    n_pieces = processor.vocab_size()
    if n_pieces > n_vocab:
        raise _too_many_tokens(path, n_pieces, n_vocab)
    tokens, types = files.padding()
    scores = [-10000.0] * n_vocab
    for i in range(n_pieces):
        tokens[i] = processor.IdToPiece(i).encode()
        scores[i] = processor.GetScore(i)
        if processor.IsUnknown(i):
            types[i] = TokenType.UNKNOWN
        elif processor.IsControl(i):
            types[i] = TokenType.CONTROL
        elif processor.IsByte(i):
            types[i] = TokenType.BYTE
        elif not processor.IsUnused(i):
            types[i] = TokenType.NORMAL
    for piece, i in (read_json(path / "added_tokens.json") or {}).items():
        if type(i) is int and 0 <= i < n_vocab:
            tokens[i], types[i], scores[i] = piece.encode(), TokenType.USER_DEFINED, -1000.0
    decoder = files.config.get("added_tokens_decoder")
    for key, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if key.isascii() and key.isdecimal() and int(key) < n_vocab and isinstance(entry, dict):
            piece, i = str(entry.get("content", "")), int(key)
            tokens[i], types[i] = _added_token(piece, entry.get("special") is True)
            scores[i] = -1000.0
    return Vocabulary(model="llama", pre="default", tokens=tokens, types=types, scores=scores, special=files.special)


def _load_sentencepiece(path: Path) -> Any:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto((path / "tokenizer.model").read_bytes())
    except (RuntimeError, OSError) as error:
        raise TokenizerError(
            f"{path / 'tokenizer.model'} is not a SentencePiece model: {printable(error)}", path=path
        ) from error
    return processor


def _added_tokens(document: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Text of an added token -> its flags. tokenizer.json lists them; the config may name further special ones."""
    added: dict[str, dict[str, Any]] = {}
    entries = document.get("added_tokens") or []
    if not isinstance(entries, list):
        raise TokenizerError(f"{path / 'tokenizer.json'}: 'added_tokens' is not a list", path=path)
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise TokenizerError(f"{path / 'tokenizer.json'}: an added token has no content", path=path)
        added[entry["content"]] = {
            "special": entry.get("special") is True,
            "normalized": entry.get("normalized") is True,
        }
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            # transformers makes every token that the config names a special one
            added.setdefault(content, {"special": True, "normalized": False})
    return added


def _ids(files: _Files) -> dict[str, int]:
    """Text -> id of every token, those of the model and the added ones. Raises TokenizerError."""
    path, document = files.path, files.document
    vocabulary = document["model"]["vocab"]
    added = {entry["content"]: entry.get("id") for entry in document.get("added_tokens") or []}
    ids: dict[str, int] = {**vocabulary, **added}
    if not all(type(i) is int and i >= 0 for i in ids.values()):
        raise TokenizerError(f"{path / 'tokenizer.json'}: an id is not a natural number", path=path)
    if not ids:
        raise TokenizerError(f"{path / 'tokenizer.json'} has no tokens", path=path)
    if max(ids.values()) >= files.n_vocab:
        raise _too_many_tokens(path, max(ids.values()) + 1, files.n_vocab)
    return ids


def _added_token(piece: str, special: bool) -> tuple[bytes, TokenType]:
    # Some checkpoints leave the flag off tokens that are special all the same (conversion/base.py of llama.cpp)
    looks_special = (
        piece in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (piece.startswith("<|") and piece.endswith("|>"))
        or (piece.startswith("<｜") and piece.endswith("｜>"))
        or (piece.startswith("<unused") and piece.endswith(">"))
    )
    if special or looks_special:
        return piece.encode(), TokenType.CONTROL
    return piece.replace("▁", " ").encode(), TokenType.USER_DEFINED


def _pretokenizer(tokenizer: Any, path: Path) -> str:
    with _translated(path):
        ids = tokenizer.encode(pretokenizers.PROBE_TEXT).ids
    digest = sha256(str(ids).encode()).hexdigest()
    if digest not in pretokenizers.NAMES:
        raise UnsupportedTokenizer(
            f"{path / 'tokenizer.json'} splits text in a way that this version does not know (hash {digest})",
            hint="Every known pre-tokenizer of llama.cpp gives other ids, so the file would answer wrongly.",
            path=path,
            digest=digest,
        )
    return pretokenizers.NAMES[digest]


def _merges(document: Mapping[str, Any], path: Path) -> list[bytes]:
    """Merges as "left right", a space inside a part written as llama.cpp wants it: U+0120."""
    merges = document["model"].get("merges")
    if not isinstance(merges, list) or not merges:
        raise TokenizerError(f"{path / 'tokenizer.json'} has no merges", path=path)
    if all(isinstance(merge, str) for merge in merges):
        return [merge.encode() for merge in merges]
    if all(isinstance(m, list) and len(m) == 2 and all(isinstance(part, str) for part in m) for m in merges):
        return [f"{a.replace(' ', 'Ġ')} {b.replace(' ', 'Ġ')}".encode() for a, b in merges]
    raise TokenizerError(f"{path / 'tokenizer.json'}: its merges are neither strings nor pairs", path=path)


def _too_many_tokens(path: Path, n_tokens: int, n_vocab: int) -> TokenizerError:
    return TokenizerError(
        f"the tokenizer in {path} has ids up to {n_tokens - 1:,}, but vocab_size is {n_vocab:,}",
        hint="The tokenizer and the weights do not belong together, or tokens were added without resizing.",
        path=path,
        n_tokens=n_tokens,
    )


def _check_padding(path: Path, vocabulary: Vocabulary, n_vocab: int) -> None:
    missing = sum(1 for token in vocabulary.tokens if token.startswith(b"[PAD"))
    if missing > max(_PADDING_TOKENS, n_vocab * _PADDING_SHARE):
        raise TokenizerError(
            f"the tokenizer in {path} has {n_vocab - missing:,} tokens for an embedding of {n_vocab:,} rows",
            hint="The tokenizer and the weights do not belong together.",
            path=path,
            n_tokens=n_vocab - missing,
        )
