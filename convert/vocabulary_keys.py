"""A vocabulary as GGUF keys, in the order of llama.cpp's converter."""

from __future__ import annotations

from typing import Any

import gguf

from convert.vocabulary import Vocabulary
from models.vocabulary_rules import VocabularyRules

# Fill-in-the-middle tokens that llama.cpp does not find by their text: Mistral's, and Seed-Coder's. gguf has no
# methods for these keys.
_FIM_KEYS = {
    b"[PREFIX]": gguf.Keys.Tokenizer.FIM_PRE_ID,
    b"[SUFFIX]": gguf.Keys.Tokenizer.FIM_SUF_ID,
    b"[MIDDLE]": gguf.Keys.Tokenizer.FIM_MID_ID,
    b"<[fim-prefix]>": gguf.Keys.Tokenizer.FIM_PRE_ID,
    b"<[fim-suffix]>": gguf.Keys.Tokenizer.FIM_SUF_ID,
    b"<[fim-middle]>": gguf.Keys.Tokenizer.FIM_MID_ID,
}


def add_vocabulary(writer: gguf.GGUFWriter, rules: VocabularyRules, vocabulary: Vocabulary) -> None:
    """`tokenizer.*`, all of it."""
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.remove_extra_whitespaces is not None:
        writer.add_remove_extra_whitespaces(vocabulary.remove_extra_whitespaces)
    if vocabulary.precompiled_charsmap:
        writer.add_precompiled_charsmap(vocabulary.precompiled_charsmap)
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre is not None:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    n_vocab, special = len(vocabulary.tokens), vocabulary.special
    ids = dict(special.ids)
    if rules.special_ids is not None and rules.special_ids.n_vocab in (n_vocab, None):
        ids = {**ids, **rules.special_ids.ids}
    # gguf has no key for "cls": llama.cpp does not read it
    for kind, token in ids.items():
        if token < n_vocab and (add_id := getattr(writer, f"add_{kind}_token_id", None)) is not None:
            add_id(token)
    for kind, value in special.add.items():
        if (add_flag := getattr(writer, f"add_add_{kind}_token", None)) is not None:
            add_flag(value)
    if special.chat_template:
        _add_chat_template(writer, special.chat_template)
    if rules.no_bos_at == n_vocab and "bos" not in special.add:
        writer.add_add_bos_token(False)
    _add_fill_in_the_middle(writer, vocabulary)


def _add_chat_template(writer: gguf.GGUFWriter, template: str | list[dict[str, Any]]) -> None:
    writer.add_chat_template(template)
    # gguf collects the names in a set: in an order that changes from run to run
    names = writer.kv_data[0].get("tokenizer.chat_templates")
    if names is not None:
        names.value.sort()


def _add_fill_in_the_middle(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    for i, token in enumerate(vocabulary.tokens):
        key = _FIM_KEYS.get(token)
        if key is not None:
            writer.add_uint32(key, i)
