"""The search for a pre-tokenizer: small byte-level BPEs that split as each well-known tokenizer does."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from convert.search_text import search_texts
from convert.tokenizer import Vocabulary, read_vocabulary
from convert.trial import make_trial
from models.errors import UnsupportedError
from tests.mixed_text import mixed_lines

CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + END
LLAMA3 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + END
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SLASHED = END.replace(r"[\r\n]*|", r"[\r\n/]*|", 1)
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}|" + SLASHED
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTION}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTION}?|"
    r"\p{N}{1,3}|" + SLASHED
)
HAN_UPPER, HAN_LOWER = UPPER.replace("]", r"&&[^\p{Han}]]"), LOWER.replace("]", r"&&[^\p{Han}]]")
KIMI = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{HAN_UPPER}*{HAN_LOWER}+{CONTRACTION}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{HAN_UPPER}+{HAN_LOWER}*{CONTRACTION}?|\p{{N}}{{1,3}}|" + END
)
QWEN35 = (
    CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED_CODER = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
LATIN_AND_KIN = "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿ"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def split(pattern: str, behavior: str = "isolated") -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior)


def letters(*, use_regex: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def digits() -> Any:
    return pre_tokenizers.Digits(individual_digits=True)


# llama.cpp's name -> the steps of the tokenizer that it is named after
STEPS: dict[str, list[Any]] = {
    "gpt-2": [letters(use_regex=True)],
    "llama-bpe": [split(LLAMA3), letters()],
    "qwen2": [split(QWEN2), letters()],
    "qwen35": [split(QWEN35), letters()],
    "tekken": [split(TEKKEN), letters()],
    "gpt-4o": [split(GPT4O), letters()],
    "kimi-k2": [split(KIMI), letters()],
    "starcoder": [digits(), letters(use_regex=True)],
    "bailingmoe": [split(BAILING), letters()],
    "seed-coder": [split(SEED_CODER), letters()],
    "deepseek-v3": [split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK3), letters()],
    "deepseek-coder": [
        split("[\r\n]"),
        split(r"\s?\p{L}+"),
        split(r"\s?\p{P}+"),
        split("[一-龥ࠀ-一가-퟿]+"),
        digits(),
        letters(),
    ],
    "deepseek-llm": [
        split("[\r\n]"),
        split(rf"\s?[{LATIN_AND_KIN}]+"),
        split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
        split(r"\s+$"),
        split("[一-龥ࠀ-一가-퟿]+"),
        digits(),
        letters(),
    ],
    "superbpe": [split(r"\p{N}+"), split(r"(?=(\d{3})+(?!\d))"), letters()],
    "laguna": [split(r"[^\n]+|[\n]+"), split(QWEN2), letters()],
    "falcon": [
        pre_tokenizers.Punctuation("contiguous"),
        letters(use_regex=True),
        pre_tokenizers.Digits(individual_digits=False),
        split("[0-9][0-9][0-9]"),
    ],
    "poro-chat": [split(BLOOM), letters()],
    "viking": [split(BLOOM), digits(), letters()],
    "minicpm5": [split(r"\p{N}{1,3}"), split(LLAMA3.replace("{1,3}", "+")), letters()],
}


@cache
def trained(name: str) -> str:
    """tokenizer.json of 3,000 tokens, trained on mixed text split in the way of `name`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(STEPS[name])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(mixed_lines(), trainer)
    return str(tokenizer.to_str())


def read(name: str, folder: Path) -> Vocabulary:
    (folder / "tokenizer.json").write_text(trained(name))
    return read_vocabulary(folder, 3000, ())


@pytest.mark.parametrize("name", list(STEPS))
def test_finds_one_that_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    vocabulary = read(name, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_str(trained(name))
    expected = {text: tokenizer.encode(text, add_special_tokens=False).ids for text in mixed_lines()}
    assert sum(len(text.encode()) for text in expected) > 90_000
    assert make_trial(vocabulary, expected).first_difference() is None, vocabulary.pre


@pytest.mark.parametrize("name", ["gpt-2", "qwen2", "gpt-4o", "deepseek-v3", "falcon"])
def test_finds_that_very_one_where_its_tokens_tell(name: str, tmp_path: Path) -> None:
    assert read(name, tmp_path).pre == name


def test_what_was_searched_is_part_of_the_check(tmp_path: Path) -> None:
    vocabulary = read("gpt-2", tmp_path)
    assert len(vocabulary.expected_ids) > len(search_texts([], []))
    assert "does not know this tokenizer by its hash" in vocabulary.notes[0]
    assert str(sum(map(len, vocabulary.expected_ids)))[:2] in vocabulary.notes[0]


def test_refusal_tells_where_the_nearest_parts(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(trained("gpt-2"))
    tokenizer = tokenizers.Tokenizer.from_str(trained("gpt-2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split("[aeiou]"), letters(use_regex=True)])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    with pytest.raises(UnsupportedError) as raised:
        read_vocabulary(tmp_path, 3000, ())
    assert raised.value.text in search_texts([], [])
    assert f"{raised.value.pretokenizer!r}, the nearest, parts from it at" in str(raised.value)
