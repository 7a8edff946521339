"""A Hugging Face tokenizer as GGUF metadata: which kind a checkpoint holds, and what becomes of it.

    tokenizer.json                    byte-level BPE, BPE with byte fallback, unigram
    tokenizer.model, spiece.model     SentencePiece, BPE and unigram
    *.tiktoken, tiktoken.model        )
    tekken.json                       )  made into a tokenizer.json of byte-level BPE first
    vocab.json with merges.txt        )

A kind that llama.cpp can be told in more than one way gives several forms; the first on which llama.cpp gives the ids
of the tokenizer is taken. While the tokenizer is in memory it also answers what the self-check will ask: the ids of
a set of texts. Nothing of it outlives `read_vocabulary`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from convert.added_marks import settle_added_marks
from convert.byte_fallback import begins_with_space, byte_fallback_forms
from convert.byte_level import read_byte_level_bpe
from convert.check_texts import LIMIT_TEXTS
from convert.checkpoint import parse_json, read_json, read_text
from convert.sentencepiece_model import UNIGRAM, SentencePieceModel, load_sentencepiece, read_sentencepiece
from convert.special_tokens import add_family_roles, read_special_tokens
from convert.tekken import CONFIG as TEKKEN_CONFIG
from convert.tekken import read_tekken
from convert.tiktoken_files import is_tiktoken, read_tiktoken, tiktoken_file
from convert.unigram import sentencepiece_unigram_forms, unigram_forms
from convert.vocab_merges import END, read_vocab_merges
from convert.vocabulary import (
    TokenizerFiles,
    TokenType,
    UnsupportedTokenizer,
    Vocabulary,
    check_vocabulary_shape,
    has_every_byte,
    translated,
)
from models.errors import TokenizerError
from models.text import printable
from models.vocabulary_rules import DEFAULT, VocabularyRules

__all__ = ["TokenType", "UnsupportedTokenizer", "Vocabulary", "read_vocabulary"]

_SENTENCEPIECE_NAMES = ("tokenizer.model", "spiece.model", "tokenizer.model.v3", "tokenizer.model.v1")
_UNREAD = {"vocab.txt": "a WordPiece tokenizer", "rwkv_vocab_v20230424.txt": "the tokenizer of RWKV"}
_NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

Encode = Callable[[str], list[int]]


def read_vocabulary(
    path: Path, n_vocab: int, check_texts: Sequence[str], rules: VocabularyRules = DEFAULT
) -> Vocabulary:
    """Read the tokenizer of the checkpoint at `path`, for an embedding of `n_vocab` rows.

    Raises TokenizerError, UnsupportedError.
    """
    config = read_json(path / "tokenizer_config.json") or {}
    for name, value in (read_json(path / "special_tokens_map.json") or {}).items():
        if name.removesuffix("_token") in _NAMED_TOKENS:
            config.setdefault(name, value)
    text = read_text(path / "tokenizer.json")
    document = None if text is None else _document(text, path)
    model_path = _sentencepiece_path(path, document)
    is_foreign = document is None and model_path is None
    if is_foreign:
        document, config = _foreign_document(path, config)
        text = json.dumps(document)
    tokenizer = None if text is None else _load_tokenizer(path, text)
    del text
    special = read_special_tokens(path, document, config)
    files = TokenizerFiles(path, config, document or {}, special, n_vocab, rules)
    if model_path is not None:
        model = load_sentencepiece(model_path)
        forms = _sentencepiece_forms(files, model, tokenizer)
        encode = model.processor.EncodeAsIds if tokenizer is None else _encoder(path, tokenizer)
    else:
        forms = _document_forms(files, tokenizer)
        encode = _encoder(path, tokenizer)
    expected = {check_text: list(encode(check_text)) for check_text in check_texts}
    vocabulary = _first_that_fits(path, forms, expected)
    vocabulary.expected_ids = expected | vocabulary.expected_ids
    add_family_roles(path, vocabulary.special, rules, vocabulary.tokens)
    if vocabulary.model == "llama":
        vocabulary.prefix_if_absent = _is_metaspace(document)
        vocabulary.add_space_prefix = _space_prefix_key(files, vocabulary.add_space_prefix is not False)
    elif vocabulary.model == "gemma4":
        vocabulary.add_space_prefix = rules.add_space_prefix
    elif vocabulary.model == "gpt2" and rules.reads_add_prefix_space:
        vocabulary.add_space_prefix = _flag(config.get("add_prefix_space"))
    if tokenizer is not None and not is_foreign:  # other forms do not say what stands around a text
        settle_added_marks(path, vocabulary, tokenizer)
    check_vocabulary_shape(path, vocabulary)
    return vocabulary


def _space_prefix_key(files: TokenizerFiles, prefixes: bool) -> bool | None:
    """`add_space_prefix` is what the tokenizer does; where that is llama.cpp's default, as its converter writes it."""
    if not prefixes:
        return False
    said = files.rules.add_space_prefix
    if said is None and files.rules.reads_add_prefix_space:
        said = _flag(files.config.get("add_prefix_space"))
    return None if said is None else True


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _document_forms(files: TokenizerFiles, tokenizer: Any) -> Iterator[Vocabulary]:
    """Out of tokenizer.json, or what stands for it. Raises UnsupportedTokenizer for other kinds."""
    model = files.document["model"]
    kind = model.get("type", "Unigram" if isinstance(model["vocab"], list) else "BPE")
    if kind == "BPE" and isinstance(model["vocab"], dict):
        if model.get("byte_fallback") is True:
            yield from byte_fallback_forms(files, tokenizer)
        else:
            yield read_byte_level_bpe(files, tokenizer)
    elif kind == "Unigram" and isinstance(model["vocab"], list):
        yield from unigram_forms(files, tokenizer)
    else:
        raise UnsupportedTokenizer(
            f"{files.path / 'tokenizer.json'} is a {printable(kind, 40)} tokenizer; BPE and unigram are converted",
            path=files.path,
        )


def _sentencepiece_forms(files: TokenizerFiles, model: SentencePieceModel, tokenizer: Any) -> Iterator[Vocabulary]:
    vocabulary = read_sentencepiece(files, model)
    if tokenizer is not None:  # transformers reads tokenizer.json where there are both
        vocabulary.add_space_prefix = begins_with_space(files, tokenizer)
    if model.model_type == UNIGRAM:
        yield from sentencepiece_unigram_forms(vocabulary, model)
    else:
        yield vocabulary


def _first_that_fits(path: Path, forms: Iterable[Vocabulary], expected: dict[str, list[int]]) -> Vocabulary:
    """The first form on which llama.cpp gives the ids that are expected; the first of all if none does, which the
    self-check of the file then refuses. A kind with one form is not tried."""
    iterator = (form for form in forms if has_every_byte(form))
    first = form = next(iterator, None)
    if first is None or form is None:
        raise UnsupportedTokenizer(
            f"the tokenizer in {path} has no tokens for single bytes: llama.cpp ends its process at a character "
            "that it does not know",
            path=path,
        )
    while (following := next(iterator, None)) is not None:
        if _fits(form, expected):
            return form
        form = following
    return form if form is first or _fits(form, expected) else first


def _fits(vocabulary: Vocabulary, expected: dict[str, list[int]]) -> bool:
    from convert.trial import make_trial  # most tokenizers do without, and it takes a third of their time to import

    strict = {text: ids for text, ids in expected.items() if text not in LIMIT_TEXTS and not text.startswith(" ")}
    return not strict or make_trial(vocabulary, strict).first_difference() is None


def _sentencepiece_path(path: Path, document: dict[str, Any] | None) -> Path | None:
    """The SentencePiece model to read, if the tokenizer is one: beside a byte-level tokenizer.json it is not."""
    if document is not None and document["model"].get("type", "BPE") == "BPE":
        model = document["model"]
        if isinstance(model["vocab"], dict) and model.get("byte_fallback") is not True:
            return None
    for name in _SENTENCEPIECE_NAMES:
        if (path / name).is_file() and not is_tiktoken(path / name):
            return path / name
    return None


def _foreign_document(path: Path, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tokenizer.json made of another form, and tokenizer_config.json with what that form says itself."""
    if (path / "tekken.json").is_file():
        return read_tekken(path / "tekken.json"), {**TEKKEN_CONFIG, **config}
    ranks = tiktoken_file(path)
    if ranks is not None:
        return read_tiktoken(ranks, config), config
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return read_vocab_merges(path, config), {"eos_token": END, **config}
    for name, kind in _UNREAD.items():
        if (path / name).is_file():
            raise UnsupportedTokenizer(f"{path / name} is {kind}, which is not converted", path=path)
    if (path / "vocab.json").is_file():
        raise UnsupportedTokenizer(
            f"{path} has vocab.json but neither merges.txt, tokenizer.json nor tokenizer.model",
            hint="Load it with transformers' AutoTokenizer and save it again: that writes tokenizer.json.",
            path=path,
        )
    raise TokenizerError(
        f"{path} has no tokenizer: neither tokenizer.json nor tokenizer.model",
        hint="Fetch it from the repository of the model.",
        path=path,
    )


def _document(text: str, path: Path) -> dict[str, Any]:
    document = parse_json(text, path / "tokenizer.json")
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise TokenizerError(f"{path / 'tokenizer.json'} has no model with a vocabulary", path=path)
    assert isinstance(document, dict)
    return document


def _is_metaspace(document: dict[str, Any] | None) -> bool:
    pre_tokenizer = (document or {}).get("pre_tokenizer")
    return isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "Metaspace"


def _load_tokenizer(path: Path, text: str) -> Any:
    import tokenizers

    with translated(path):
        return tokenizers.Tokenizer.from_str(text)


def _encoder(path: Path, tokenizer: Any) -> Encode:
    def encode(text: str) -> list[int]:
        with translated(path):
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
            return ids

    return encode
