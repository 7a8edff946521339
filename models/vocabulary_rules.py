"""What may be said of the vocabulary of a family that the files of a checkpoint do not say.

Apart from the families, which need numpy: the process that reads a tokenizer does without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Token types, as `tokenizer.ggml.token_type` numbers them."""


@dataclass(frozen=True)
class SpecialIds:
    """Special tokens that stand at fixed ids in vocabularies of `n_vocab` tokens (None: of any size):
    kind ("eot", ...) -> id."""

    n_vocab: int | None
    ids: Mapping[str, int]


@dataclass(frozen=True)
class VocabularyRules:
    """How the vocabulary of a family differs from what its files say. Its mappings are plain dicts: rules travel to
    the process that reads the tokenizer.

    add_space_prefix   the key is written, though it be the default, for a SentencePiece vocabulary; its value is what
                       the tokenizer does, which this tells of the family's own
    reads_add_prefix_space   the key is written where tokenizer_config.json has `add_prefix_space`
    special            kind -> text of the token that has this role where the files name none
    overrides          kind -> text of the token that has this role whatever the files say
    special_ids        roles by id, for one size of vocabulary
    eos_field          the field of config.json that holds the id of EOS, whatever the other files say
    add_bos            whether a prompt begins with BOS, where the tokenizer does not say
    no_bos_at          size of a vocabulary that begins a prompt without BOS unless its tokenizer adds one itself
    types              text of a token -> the type that it has whatever its flags say
    unused_prefix      a SentencePiece piece that begins so is never used
    appended           control tokens that follow the pieces of tokenizer.model, which no file lists
    bpe_model          `tokenizer.ggml.model` of a tokenizer.json with byte fallback
    """

    add_space_prefix: bool | None = None
    reads_add_prefix_space: bool = False
    special: Mapping[str, str] = field(default_factory=dict)
    overrides: Mapping[str, str] = field(default_factory=dict)
    special_ids: SpecialIds | None = None
    eos_field: str | None = None
    add_bos: bool | None = None
    no_bos_at: int | None = None
    types: Mapping[str, int] = field(default_factory=dict)
    unused_prefix: str | None = None
    appended: tuple[str, ...] = ()
    bpe_model: str | None = None


DEFAULT = VocabularyRules()
