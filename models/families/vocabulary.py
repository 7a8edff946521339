"""What a family knows of its vocabulary that the files of a checkpoint do not say, as data.

Everything here is what `set_vocab` of the family's class does in llama.cpp's converter (conversion/*.py) beyond its
common paths. A rule that names a token by its text holds only for a vocabulary that has that token, one by id only
for a vocabulary of that size: a checkpoint may carry any tokenizer.
"""

from __future__ import annotations

from models.vocabulary_rules import DEFAULT, USER_DEFINED, SpecialIds, VocabularyRules

__all__ = ["DEFAULT", "SpecialIds", "VocabularyRules"]

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

# In turn: GLM-4 as GlmForCausalLM, GLM-4 of 2025 as Glm4ForCausalLM, and the mixtures of experts.
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
