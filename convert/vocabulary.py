"""What a tokenizer becomes in a GGUF file, and what the readers of every kind of tokenizer share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

from convert.special_tokens import SpecialTokens
from models.errors import TokenizerError, UnsupportedError
from models.text import printable
from models.vocabulary_rules import VocabularyRules

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


TokenizerModel = Literal["gpt2", "llama", "t5", "gemma4"]
"""llama.cpp's kinds: byte-level BPE, BPE by the scores of a SentencePiece model, unigram, BPE on characters."""


@dataclass
class Vocabulary:
    """What becomes `tokenizer.*` in the file, with the ids that the self-check expects.

    `tokens`, `types` and `scores` (not for byte-level BPE) have one entry for each row of the embedding; `pre` is
    None where the model has no pre-tokenizers. `prefixes_space`: the tokenizer begins a text with a space mark;
    `prefix_if_absent`: unless the text does itself, while llama.cpp puts one always. `notes` are for the person.
    """

    model: TokenizerModel
    pre: str | None
    tokens: list[bytes]
    types: list[int]
    special: SpecialTokens
    scores: list[float] = field(default_factory=list)
    merges: list[bytes] = field(default_factory=list)
    add_space_prefix: bool | None = None
    remove_extra_whitespaces: bool | None = None
    precompiled_charsmap: bytes = b""
    expected_ids: dict[str, list[int]] = field(default_factory=dict)
    prefix_if_absent: bool = False
    notes: list[str] = field(default_factory=list)


class UnsupportedTokenizer(TokenizerError, UnsupportedError):
    """The tokenizer is there, in a form that is not read."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What all readers are given: tokenizer_config.json, the special tokens, the rows of the embedding, the rules
    of the family, and tokenizer.json, or what stands for it (empty without either)."""

    path: Path
    config: Mapping[str, Any]
    document: Mapping[str, Any]
    special: SpecialTokens
    n_vocab: int
    rules: VocabularyRules

    def padding(self) -> tuple[list[bytes], list[int]]:
        """Tokens and types of a vocabulary of which nothing is known yet."""
        return [f"[PAD{i}]".encode() for i in range(self.n_vocab)], [int(TokenType.UNUSED)] * self.n_vocab

    def added_token(self, piece: str, special: bool) -> tuple[bytes, int]:
        """Text and type of an added token. Some checkpoints leave the flag off tokens that are special all the same
        (conversion/base.py of llama.cpp, does_token_look_special)."""
        if piece in self.rules.types:
            return piece.encode("utf-8", "replace"), self.rules.types[piece]
        looks_special = (
            piece in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
            or (piece.startswith("<|") and piece.endswith("|>"))
            or (piece.startswith("<｜") and piece.endswith("｜>"))
            or (piece.startswith("<unused") and piece.endswith(">"))
        )
        if special or looks_special:
            return piece.encode("utf-8", "replace"), TokenType.CONTROL
        return piece.replace("▁", " ").encode("utf-8", "replace"), TokenType.USER_DEFINED


@contextmanager
def translated(path: Path, name: str = "tokenizer.json") -> Iterator[None]:
    """Around every call of tokenizers: for a broken file it raises plain Exception, or its Rust code panics."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        # PanicException is no Exception, and no module exports it
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{path / name} is not a tokenizer: {printable(error)}", path=path) from error


def too_many_tokens(path: Path, n_tokens: int, n_vocab: int) -> TokenizerError:
    return TokenizerError(
        f"the tokenizer in {path} has ids up to {n_tokens - 1:,}, but vocab_size is {n_vocab:,}",
        hint="The tokenizer and the weights do not belong together, or tokens were added without resizing.",
        path=path,
        n_tokens=n_tokens,
    )


def check_vocabulary_shape(path: Path, vocabulary: Vocabulary) -> None:
    """Raise TokenizerError for a vocabulary far smaller than the embedding, or with a token twice."""
    n_vocab = len(vocabulary.tokens)
    missing = sum(1 for token in vocabulary.tokens if token.startswith(b"[PAD"))
    if missing > max(_PADDING_TOKENS, n_vocab * _PADDING_SHARE):
        raise TokenizerError(
            f"the tokenizer in {path} has {n_vocab - missing:,} tokens for an embedding of {n_vocab:,} rows",
            hint="The tokenizer and the weights do not belong together.",
            path=path,
            n_tokens=n_vocab - missing,
        )
    check_no_doubles(vocabulary, path)


def has_every_byte(vocabulary: Vocabulary) -> bool:
    """False for a SentencePiece vocabulary on which llama.cpp would end the process at an unknown character."""
    if vocabulary.model != "llama":
        return True
    tokens = set(vocabulary.tokens)
    return all(b"<0x%02X>" % byte in tokens or bytes([byte]) in tokens for byte in range(256))


def check_no_doubles(vocabulary: Vocabulary, path: Path | None = None) -> None:
    """Raise TokenizerError for two tokens of one text: llama.cpp, which reads each up to its first NUL, would end
    the process."""
    distinct = set(vocabulary.tokens)
    if len(distinct) == len(vocabulary.tokens) and b"" not in distinct and b"\0" not in b"".join(vocabulary.tokens):
        return
    tokens = enumerate(vocabulary.tokens)
    twice = _first_double(token.split(b"\0", 1)[0] or b"[EMPTY_%d]" % i for i, token in tokens)
    if twice is not None:
        text = printable(twice.decode("utf-8", "replace"), 80)
        where = f" in {path}" if path is not None else ""
        raise TokenizerError(f"the tokenizer{where} has the token {text!r} twice", path=path)


def _first_double(tokens: Iterable[bytes]) -> bytes | None:
    seen: set[bytes] = set()
    for token in tokens:
        if token in seen:
            return token
        seen.add(token)
    return None
