"""What a family knows of its vocabulary that the files of a checkpoint do not say, as data.

Everything here is what `set_vocab` of the family's class does in llama.cpp's converter (conversion/*.py) beyond its
common paths. A rule that names a token by its text holds only for a vocabulary that has that token, one by id only
for a vocabulary of that size: a checkpoint may carry any tokenizer.
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

# CodeLlama is the llama architecture with 32,016 tokens. SmolLM2 and the small Granite models have 49,152. Mistral,
# Ministral, Granite (dense and experts, not hybrid), Apertus and all else that llama.cpp's converter derives from
# its class for Llama have these rules, too.
LLAMA = VocabularyRules(reads_add_prefix_space=True, special_ids=SpecialIds(32016, {"eot": 32010}), no_bos_at=49152)
GRANITE = APERTUS = MISTRAL = LLAMA
ERNIE = VocabularyRules(reads_add_prefix_space=True)

# CodeGemma ends a turn with this token; llama.cpp finds its fill-in-the-middle tokens by their text.
GEMMA = VocabularyRules(add_space_prefix=False, special_ids=SpecialIds(256000, {"eot": 107}))
GEMMA2 = GEMMA3 = VocabularyRules(add_space_prefix=False)
# Tokens that the reader of a reply must see: as control tokens they would be left out of its text.
_GEMMA4_VISIBLE = (
    "<|channel>",
    "<channel|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
)
GEMMA4 = VocabularyRules(
    add_space_prefix=False,
    add_bos=True,
    types=dict.fromkeys(_GEMMA4_VISIBLE, USER_DEFINED),
    bpe_model="gemma4",
)

# GLM-4 and GLM-Edge as GlmForCausalLM, GLM-4 of 2025 as Glm4ForCausalLM, and its mixtures of experts.
GLM = VocabularyRules(special={"eos": "<|endoftext|>", "eot": "<|user|>", "unk": "<|endoftext|>"}, add_bos=False)
GLM4 = VocabularyRules(
    special={"eos": "<|endoftext|>", "eot": "<|user|>", "unk": "<|endoftext|>", "bos": "<|endoftext|>"}
)
GLM4_MOE = VocabularyRules(
    special={"bos": "[gMASK]", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>"}
)
# The tokenizer of ChatGLM3 numbers these after the pieces of its model, in Python code.
CHATGLM3 = VocabularyRules(
    add_bos=False,
    appended=(
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "sop",
        "eop",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    ),
)

QWEN1 = VocabularyRules(special={"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"})
# A chat ends its turns with <|im_end|>, which the config does not say.
INTERNLM2 = VocabularyRules(add_space_prefix=True, overrides={"eos": "<|im_end|>"}, unused_prefix="[UNUSED")
INTERNLM3 = VocabularyRules(reads_add_prefix_space=True, overrides={"eos": "<|im_end|>"})
HUNYUAN = VocabularyRules(eos_field="eod_token_id")
# Their configs name another token.
HUNYUAN_MOE = VocabularyRules(overrides={"bos": "<|bos|>"})
PHI2 = VocabularyRules(add_bos=False)
NEMOTRON = VocabularyRules(special_ids=SpecialIds(None, {"pad": 0, "unk": 1}))
SOLAR_OPEN = VocabularyRules(
    special={"eos": "<|endoftext|>", "eot": "<|endoftext|>", "unk": "<unk>", "bos": "<|startoftext|>"}
)
