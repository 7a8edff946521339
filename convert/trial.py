"""What llama.cpp makes of a vocabulary, asked before there is a file.

A vocabulary is tried on a handful of texts, so only the tokens that can come of these are written: those whose text
is part of one of them. With 150,000 tokens that leaves a few thousand, which llama.cpp loads in 10 ms.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import gguf

from convert.byte_letters import BYTES, LETTERS, RAW_PRETOKENIZERS
from convert.gguf_writer import header_bytes
from convert.special_tokens import SpecialTokens
from convert.vocabulary import TokenType, Vocabulary, check_no_doubles
from convert.vocabulary_keys import add_vocabulary
from models.errors import GenerationError, LoadError, TokenizerError
from models.native import Vocabulary as NativeVocabulary
from models.native import open_vocabulary
from models.vocabulary_rules import DEFAULT

Expected = Mapping[str, Sequence[int]]
"""Text -> the ids that the tokenizer gives for it, without the special tokens around it."""


@dataclass(frozen=True)
class Difference:
    """Where llama.cpp first parts from the tokenizer: `n_equal` texts before it are equal, `text` is not.

    `rest` is what of the text is left from there on.
    """

    n_equal: int
    text: str
    rest: str


@dataclass(frozen=True)
class Trial:
    """A vocabulary cut down to what can come of some texts. `ids`: number in the cut vocabulary -> in the whole."""

    vocabulary: Vocabulary
    expected: Expected
    ids: Sequence[int]
    pieces: Mapping[int, bytes]

    def first_difference(self, **changes: object) -> Difference | None:
        """Let llama.cpp tokenize every text; None if all ids are those expected.

        `changes` replace fields of the vocabulary. Raises TokenizerError if llama.cpp cannot load it.
        """
        candidate = replace(self.vocabulary, **changes)  # type: ignore[arg-type]
        with _opened(candidate) as native:
            for number, (text, expected) in enumerate(self.expected.items()):
                small = native.tokenize(text, add_special=False, parse_special=False)
                found = [self.ids[i] for i in small]
                if found != list(expected):
                    return Difference(number, text, self._rest(text, found, expected))
        return None

    def _rest(self, text: str, found: Sequence[int], expected: Sequence[int]) -> str:
        equal = 0
        while equal < min(len(found), len(expected)) and found[equal] == expected[equal]:
            equal += 1
        n_bytes = sum(len(self.pieces.get(i, b"")) for i in expected[:equal])
        return text.encode()[n_bytes:].decode("utf-8", "replace")


def make_trial(vocabulary: Vocabulary, expected: Expected) -> Trial:
    """`vocabulary` for the texts of `expected` only."""
    byte_level = vocabulary.model == "gpt2" and vocabulary.pre not in RAW_PRETOKENIZERS
    parts = _Parts([_as_written(text, byte_level) for text in expected])
    needed = {i for ids in expected.values() for i in ids} | set(vocabulary.special.ids.values())
    always = (TokenType.BYTE, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    ids = [
        i
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in always or i in needed or (kind == TokenType.NORMAL and token in parts)
    ]
    merges = [merge for merge in vocabulary.merges if merge.replace(b" ", b"", 1) in parts]
    pieces = {i: _bytes_of(vocabulary, i) for i in needed if i < len(vocabulary.tokens)}
    return Trial(_cut(vocabulary, ids, merges), expected, ids, pieces)


def ending_tokens(vocabulary: Vocabulary) -> set[int]:
    """The ids at which llama.cpp would end a reply. Raises TokenizerError."""
    marks = (TokenType.CONTROL, TokenType.USER_DEFINED)
    special = {*vocabulary.special.ids.values(), *vocabulary.special.ends}
    ids = [i for i, kind in enumerate(vocabulary.types) if kind in marks or i in special]
    with _opened(_cut(vocabulary, ids, [])) as native:
        return {whole for small, whole in enumerate(ids) if native.is_eog(small)}


def _cut(vocabulary: Vocabulary, ids: Sequence[int], merges: Sequence[bytes]) -> Vocabulary:
    """The part of a vocabulary that has the tokens `ids`, numbered from 0."""
    small = {whole: i for i, whole in enumerate(ids)}
    marks = {kind: small[i] for kind, i in vocabulary.special.ids.items() if i in small}
    special = SpecialTokens(ids=marks, add={"bos": False, "eos": False})
    return replace(
        vocabulary,
        tokens=[vocabulary.tokens[i] for i in ids],
        types=[vocabulary.types[i] for i in ids],
        scores=[vocabulary.scores[i] for i in ids] if vocabulary.scores else [],
        merges=list(merges) or vocabulary.merges[:1],
        special=special,
    )


@contextmanager
def _opened(vocabulary: Vocabulary) -> Iterator[NativeVocabulary]:
    check_no_doubles(vocabulary)
    with tempfile.TemporaryDirectory(prefix="handmill-") as folder:
        path = Path(folder) / "vocabulary.gguf"
        path.write_bytes(_file(vocabulary))
        try:
            with open_vocabulary(path) as native:
                yield native
        except (LoadError, GenerationError) as error:
            raise TokenizerError(f"llama.cpp does not load this tokenizer: {error}") from error


def _as_written(text: str, byte_level: bool) -> str:
    return "".join(map(LETTERS.__getitem__, text.encode())) if byte_level else "▁" + text.replace(" ", "▁")


def _bytes_of(vocabulary: Vocabulary, i: int) -> bytes:
    text = vocabulary.tokens[i].decode("utf-8", "replace")
    if vocabulary.types[i] == TokenType.BYTE:
        return b"?"
    if all(letter in BYTES for letter in text) and vocabulary.model == "gpt2":
        return bytes(BYTES[letter] for letter in text)
    return text.replace("▁", " ").encode()


class _Parts:
    """Whether a token is part of one of the texts."""

    _SHORT = 16

    def __init__(self, texts: Sequence[str]) -> None:
        self._whole = "\n\n".join(texts).encode()
        self._short = {
            text[start:end].encode()
            for text in texts
            for start in range(len(text))
            for end in range(start + 1, min(start + self._SHORT, len(text)) + 1)
        }

    def __contains__(self, token: bytes) -> bool:
        # a token of more bytes than that may still have few characters
        return token in self._short or (len(token) > self._SHORT and token in self._whole)


def _file(vocabulary: Vocabulary) -> bytes:
    writer = gguf.GGUFWriter(path=None, arch="llama")
    add_vocabulary(writer, DEFAULT, vocabulary)
    try:
        return header_bytes(writer.kv_data[0], [])
    except (struct.error, OverflowError, UnicodeEncodeError) as error:
        raise TokenizerError(f"the tokenizer cannot be stored: {error}") from error
