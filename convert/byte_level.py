"""Byte-level BPE out of tokenizer.json: the letters of GPT-2 stand for bytes, a pre-tokenizer splits the text."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from convert import pretokenizers
from convert.pretokenizer_search import PRETOKENIZERS, find_pretokenizer
from convert.vocabulary import TokenizerFiles, TokenType, Vocabulary, too_many_tokens, translated
from models.errors import TokenizerError


def read_byte_level_bpe(files: TokenizerFiles, tokenizer: Any) -> Vocabulary:
    """Raises TokenizerError, also where llama.cpp has no pre-tokenizer that splits as this tokenizer does."""
    path, document = files.path, files.document
    tokens, types = byte_level_tokens(files, tokenizer)
    vocabulary = Vocabulary(
        model="gpt2",
        pre=None,
        tokens=tokens,
        types=types,
        special=files.special,
        merges=merges_of(document, path),
    )
    vocabulary.pre = known_pretokenizer(files, tokenizer)
    if vocabulary.pre is None:
        ignores_merges = document["model"].get("ignore_merges") is True
        vocabulary.pre, ids = find_pretokenizer(path, vocabulary, tokenizer, ignores_merges)
        vocabulary.expected_ids = ids
        vocabulary.notes.append(
            f"llama.cpp does not know this tokenizer by its hash; its pre-tokenizer {vocabulary.pre!r} gives the same "
            f"ids on {sum(map(len, ids)):,} characters of text"
        )
    return vocabulary


def byte_level_tokens(files: TokenizerFiles, tokenizer: Any) -> tuple[list[bytes], list[int]]:
    """Tokens and types by id; rows of the embedding without a token are padding."""
    added = added_tokens(files)
    tokens, types = files.padding()
    for piece, i in token_ids(files).items():
        entry = added.get(piece)
        if entry is None:
            tokens[i], types[i] = piece.encode(), TokenType.NORMAL
            continue
        if not entry["normalized"]:
            # llama.cpp matches the text as it is: give it the form that the tokenizer matches
            with translated(files.path):
                encoded = tokenizer.encode(piece, add_special_tokens=False).ids
                piece = tokenizer.decode(encoded, skip_special_tokens=False)
        tokens[i], types[i] = files.added_token(piece, entry["special"])
    return tokens, types


def added_tokens(files: TokenizerFiles) -> dict[str, dict[str, Any]]:
    """Text of an added token -> its flags. tokenizer.json lists them; the config may name further special ones."""
    added: dict[str, dict[str, Any]] = {}
    path = files.path
    entries = files.document.get("added_tokens") or []
    if not isinstance(entries, list):
        raise TokenizerError(f"{path / 'tokenizer.json'}: 'added_tokens' is not a list", path=path)
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise TokenizerError(f"{path / 'tokenizer.json'}: an added token has no content", path=path)
        added[entry["content"]] = {
            "special": entry.get("special") is True,
            "normalized": entry.get("normalized") is True,
        }
    for name, value in files.config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            # transformers makes every token that the config names a special one
            added.setdefault(content, {"special": True, "normalized": False})
    return added


def token_ids(files: TokenizerFiles) -> dict[str, int]:
    """Text -> id of every token that has a row in the embedding. Raises TokenizerError.

    Added tokens beyond the embedding are left out: the model cannot know them (Gemma 3: <image_soft_token>).
    """
    path, document = files.path, files.document
    vocabulary = document["model"]["vocab"]
    added = {entry["content"]: entry.get("id") for entry in document.get("added_tokens") or []}
    if not vocabulary:
        raise TokenizerError(f"{path / 'tokenizer.json'} has no tokens", path=path)
    numbers = [*vocabulary.values(), *added.values()]
    if set(map(type, numbers)) != {int} or min(numbers) < 0:
        raise TokenizerError(f"{path / 'tokenizer.json'}: an id is not a natural number", path=path)
    ids: dict[str, int] = {**vocabulary, **added}
    if max(ids.values()) < files.n_vocab:
        return ids
    highest = max((i for piece, i in vocabulary.items() if piece not in added), default=0)
    if highest >= files.n_vocab:
        raise too_many_tokens(path, highest + 1, files.n_vocab)
    return {piece: i for piece, i in ids.items() if i < files.n_vocab}


def merges_of(document: Mapping[str, Any], path: Path) -> list[bytes]:
    """Merges as "left right", a space inside a part written as llama.cpp wants it: U+0120."""
    merges = document["model"].get("merges")
    if not isinstance(merges, list) or not merges:
        raise TokenizerError(f"{path / 'tokenizer.json'} has no merges", path=path)
    if all(isinstance(merge, str) for merge in merges):
        return [merge.encode() for merge in merges]
    if all(isinstance(m, list) and len(m) == 2 and all(isinstance(part, str) for part in m) for m in merges):
        return [f"{a.replace(' ', 'Ġ')} {b.replace(' ', 'Ġ')}".encode() for a, b in merges]
    raise TokenizerError(f"{path / 'tokenizer.json'}: its merges are neither strings nor pairs", path=path)


def known_pretokenizer(files: TokenizerFiles, tokenizer: Any) -> str | None:
    """llama.cpp's name by its hash of ids, with the special tokens that stand around a text, or without.

    Some tokenizers have two names, one with BOS and one without; of these, the one that takes whole words as the
    tokenizer does.
    """
    with translated(files.path):
        ids = tokenizer.encode(pretokenizers.PROBE_TEXT).ids
        plain = tokenizer.encode(pretokenizers.PROBE_TEXT, add_special_tokens=False).ids
    bos = files.special.ids.get("bos")
    begun = [plain if bos is None else [bos, *plain]]
    probes = [*begun, ids, plain] if files.special.add.get("bos") else [ids, plain, *begun]
    names = [pretokenizers.NAMES.get(sha256(str(probe).encode()).hexdigest()) for probe in probes]
    known = [name for name in names if name is not None and name not in pretokenizers.MISNAMED]
    whole = files.document["model"].get("ignore_merges") is True
    return next((name for name in known if PRETOKENIZERS.get(name) is whole), next(iter(known), None))
