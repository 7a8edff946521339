"""BPE with byte fallback out of tokenizer.json (Llama 2, Mistral, Gemma): SentencePiece's BPE written as merges."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from convert.byte_letters import RAW_PRETOKENIZERS
from convert.byte_level import added_tokens, known_pretokenizer, merges_of, token_ids
from convert.vocabulary import TokenizerFiles, TokenType, Vocabulary, translated

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def byte_fallback_forms(files: TokenizerFiles, tokenizer: Any) -> Iterator[Vocabulary]:
    """Ways to say it to llama.cpp, the first choice first. Raises TokenizerError.

    llama.cpp has it as a SentencePiece vocabulary, which is merged by scores (the score of a token is minus the rank
    of its merge), and as BPE on characters, which has the merges but puts no space before a text.
    """
    by_merges = _read_byte_fallback(files, tokenizer)
    named = None if files.rules.bpe_model else known_pretokenizer(files, tokenizer)
    if files.rules.bpe_model == "gemma4":
        yield replace(by_merges, model="gemma4", pre=None, scores=[-1000.0] * files.n_vocab)
        return
    if named in RAW_PRETOKENIZERS:
        yield replace(by_merges, model="gpt2", pre=named, scores=[], add_space_prefix=None)
        return
    yield replace(by_merges, merges=[])
    if not by_merges.add_space_prefix:
        yield replace(by_merges, model="gpt2", pre="sarvam-moe", scores=[], add_space_prefix=None)


def begins_with_space(files: TokenizerFiles, tokenizer: Any) -> bool:
    """Whether the tokenizer puts a space before a text."""
    with translated(files.path):
        ids = tokenizer.encode("a", add_special_tokens=False).ids
        return bool(ids) and (tokenizer.id_to_token(ids[0]) or "").startswith("▁")


def _read_byte_fallback(files: TokenizerFiles, tokenizer: Any) -> Vocabulary:
    """As a SentencePiece vocabulary: the score of a token is minus the rank of its merge."""
    added = added_tokens(files)
    ranks: dict[bytes, int] = {}
    merges = merges_of(files.document, files.path)
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(b" ", b"", 1), rank)
    tokens, types = files.padding()
    scores = [-10000.0] * files.n_vocab
    named = files.special.named_tokens
    for piece, i in token_ids(files).items():
        entry = added.get(piece)
        if _BYTE.fullmatch(piece):
            tokens[i], types[i] = piece.encode(), TokenType.BYTE
        elif entry is not None or piece in named:
            is_special = piece in named or (entry is not None and entry["special"])
            tokens[i], types[i] = files.added_token(piece, is_special)
            scores[i] = -1000.0
        else:
            tokens[i], types[i] = piece.encode(), TokenType.NORMAL
            # a token that no merge makes is a single character, or one that BPE never gives
            scores[i] = -float(ranks.get(tokens[i], len(ranks)))
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=scores,
        merges=merges,
        special=files.special,
        add_space_prefix=begins_with_space(files, tokenizer),
    )
