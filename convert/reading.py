"""A tokenizer read in a process of its own.

Two things come of that: it is read while the first tensors are encoded; and a file made to break a parser breaks
only that process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from convert.added_marks import settle_ends
from convert.tokenizer import Vocabulary, read_vocabulary
from models.errors import TokenizerError
from models.isolated import Ended, Isolated
from models.vocabulary_rules import DEFAULT, VocabularyRules


def vocabulary_of(
    isolated: Isolated, path: Path, n_vocab: int, check_texts: Sequence[str], rules: VocabularyRules = DEFAULT
) -> Vocabulary:
    """`read_vocabulary`, and what the ends of a reply are. Raises what it raises, and TokenizerError."""
    try:
        return isolated.call(_read, path, n_vocab, tuple(check_texts), rules)
    except Ended as ended:
        raise TokenizerError(
            f"reading the tokenizer in {path} failed: {ended}",
            hint="The tokenizer is damaged, or memory ran out.",
            path=path,
        ) from None


def _read(path: Path, n_vocab: int, check_texts: Sequence[str], rules: VocabularyRules) -> Vocabulary:
    vocabulary = read_vocabulary(path, n_vocab, check_texts, rules)
    settle_ends(vocabulary)
    return vocabulary
