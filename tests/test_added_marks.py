"""What a tokenizer puts around a text, where a reply ends, and what a family knows of its vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers

from convert.added_marks import settle_ends
from convert.check_texts import CHECK_TEXTS
from convert.tokenizer import TokenType, Vocabulary, read_vocabulary
from convert.trial import ending_tokens, make_trial
from convert.vocabulary_keys import add_vocabulary
from models.families import vocabulary as rules
from models.families.vocabulary import SpecialIds, VocabularyRules
from tests.checkpoints import Json, write_json
from tests.mixed_text import mixed_lines
from tests.test_pretokenizer_search import trained

SPECIAL = ("<s>", "</s>", "[gMASK]", "<sop>", "<|user|>", "<|endoftext|>", "<odd-end>", "<odder-end>", "<oddest>")


def document(*around: str, special: tuple[str, ...] = SPECIAL) -> Json:
    """A byte-level tokenizer with special tokens from 3,000 on; `around` a text ("A") stand those named."""
    value: Json = json.loads(trained("gpt-2"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    value["added_tokens"] = [{"id": 3000 + i, "content": text, **flags} for i, text in enumerate(special)]
    if around:
        steps: list[Json] = [
            {"Sequence": {"id": "A", "type_id": 0}} if word == "A" else {"SpecialToken": {"id": word, "type_id": 0}}
            for word in around
        ]
        ids = {word: 3000 + special.index(word) for word in around if word != "A"}
        value["post_processor"] = {
            "type": "TemplateProcessing",
            "single": steps,
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {word: {"id": word, "ids": [i], "tokens": [word]} for word, i in ids.items()},
        }
    return value


def read(
    folder: Path, value: Json, config: Json, family: VocabularyRules = rules.DEFAULT, /, **files: Any
) -> Vocabulary:
    write_json(folder / "tokenizer.json", value)
    write_json(folder / "tokenizer_config.json", config)
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return read_vocabulary(folder, 3016, (), family)


def test_one_mark_that_the_config_does_not_name(tmp_path: Path) -> None:
    vocabulary = read(tmp_path, document("<s>", "A", "</s>"), {})
    assert vocabulary.special.ids == {"bos": 3000, "cls": 3000, "eos": 3001}
    assert vocabulary.special.add == {"bos": True, "eos": True}


def test_a_mark_other_than_the_one_that_is_named(tmp_path: Path) -> None:
    vocabulary = read(tmp_path, document("<sop>", "A"), {"bos_token": "<s>", "cls_token": "<s>"})
    assert (vocabulary.special.ids["bos"], vocabulary.special.add["bos"]) == (3003, True)


def test_two_marks_are_more_than_llama_cpp_puts(tmp_path: Path) -> None:
    vocabulary = read(tmp_path, document("[gMASK]", "<sop>", "A"), {"eos_token": "<|endoftext|>"}, rules.GLM4_MOE)
    assert vocabulary.special.ids == {"bos": 3002, "cls": 3002, "eos": 3005, "eot": 3004, "unk": 3005}
    assert "the tokenizer puts 2 special tokens before a text and 0 after it" in " ".join(vocabulary.notes)


def test_no_mark_where_llama_cpp_would_put_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.byte_level.known_pretokenizer", lambda *args: "llama-bpe")
    assert read(tmp_path, document(), {"bos_token": "<s>"}).special.add == {"bos": False}


def test_ends_that_llama_cpp_would_not_see(tmp_path: Path) -> None:
    ends = [3006, 3005, 3007, 3001, 3008]
    vocabulary = read(tmp_path, document(), {"eos_token": "</s>"}, generation_config={"eos_token_id": ends})
    assert vocabulary.special.ends == ends
    settle_ends(vocabulary)
    # <|endoftext|> llama.cpp knows by its text
    assert vocabulary.special.ids == {"eos": 3001, "eot": 3006, "eom": 3007}
    assert "no further role for the tokens [3008]" in vocabulary.notes[-1]
    assert {3001, 3005, 3006, 3007} <= ending_tokens(vocabulary)
    assert not {3000, 3008} & ending_tokens(vocabulary)


def test_the_first_of_several_ends_is_eos_where_none_is_named(tmp_path: Path) -> None:
    vocabulary = read(tmp_path, document(), {}, config={"eos_token_id": [3007, 3006]})
    settle_ends(vocabulary)
    assert vocabulary.special.ids == {"eos": 3007, "eot": 3006}


def test_one_end_needs_no_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = read(tmp_path, document(), {"eos_token": "</s>"}, generation_config={"eos_token_id": 3001})
    monkeypatch.setattr("convert.trial.ending_tokens", pytest.fail)
    settle_ends(vocabulary)


def test_names_in_special_tokens_map(tmp_path: Path) -> None:
    named = {"bos_token": "<sop>", "eos_token": {"content": "</s>"}}
    vocabulary = read(tmp_path, document(), {"bos_token": "<s>"}, special_tokens_map=named)
    assert vocabulary.special.ids == {"bos": 3000, "eos": 3001}


def test_runs_of_spaces_as_added_tokens(tmp_path: Path) -> None:
    """As GPT-NeoX has them: llama.cpp finds them in a text before it splits the rest."""
    value = document(special=tuple(" " * n for n in range(17, 1, -1)))
    for token in value["added_tokens"]:
        token |= {"special": False, "normalized": True}
    vocabulary = read(tmp_path, value, {})
    assert vocabulary.types[3000:3016] == [TokenType.USER_DEFINED] * 16
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(value))
    expected = {line: tokenizer.encode(line, add_special_tokens=False).ids for line in mixed_lines()}
    assert make_trial(vocabulary, expected).first_difference() is None


# Rules of families


def keys_of(vocabulary: Vocabulary, family: VocabularyRules) -> Json:
    writer = gguf.GGUFWriter(path=None, arch="llama")
    add_vocabulary(writer, family, vocabulary)
    return {name.removeprefix("tokenizer.ggml."): entry.value for name, entry in writer.kv_data[0].items()}


def test_a_rule_for_a_token_that_is_not_there_does_not_hold(tmp_path: Path) -> None:
    family = VocabularyRules(special={"bos": "<none>", "eot": "<sop>"}, overrides={"eos": "<|im_end|>"})
    assert read(tmp_path, document(), {"eos_token": "</s>"}, family).special.ids == {"eos": 3001, "eot": 3003}


def test_overrides_win_over_the_files_and_defaults_do_not(tmp_path: Path) -> None:
    family = VocabularyRules(special={"eos": "<sop>"}, overrides={"bos": "[gMASK]"}, add_bos=True)
    special = read(tmp_path, document(), {"eos_token": "</s>", "bos_token": "<s>"}, family).special
    assert (special.ids, special.add) == ({"eos": 3001, "bos": 3002}, {"bos": True})


def test_ids_for_one_size_of_vocabulary(tmp_path: Path) -> None:
    vocabulary = read(tmp_path, document(), {"eos_token": "</s>"})
    there = keys_of(vocabulary, VocabularyRules(special_ids=SpecialIds(3016, {"eot": 3003})))
    elsewhere = keys_of(vocabulary, VocabularyRules(special_ids=SpecialIds(3017, {"eot": 3003})))
    assert (there["eot_token_id"], "eot_token_id" in elsewhere) == (3003, False)


def test_an_end_in_a_field_of_its_own(tmp_path: Path) -> None:
    family = VocabularyRules(eos_field="eod_token_id")
    assert read(tmp_path, document(), {"eos_token": "</s>"}, family, config={"eod_token_id": 3006}).special.ids == {
        "eos": 3006
    }
    assert read(tmp_path, document(), {"eos_token": "</s>"}, family, config={"eod_token_id": 9999}).special.ids == {
        "eos": 3001
    }


def test_types_of_a_family(tmp_path: Path) -> None:
    vocabulary = read(tmp_path, document(), {}, VocabularyRules(types={"<|user|>": TokenType.USER_DEFINED}))
    assert vocabulary.types[3004] == TokenType.USER_DEFINED


def test_fill_in_the_middle_tokens_that_llama_cpp_does_not_find(tmp_path: Path) -> None:
    vocabulary = read(tmp_path, document(special=("[PREFIX]", "[SUFFIX]", "[MIDDLE]")), {})
    keys = keys_of(vocabulary, rules.DEFAULT)
    assert [keys[f"fim_{part}_token_id"] for part in ("pre", "suf", "mid")] == [3000, 3001, 3002]
    assert not [name for name in keys_of(read(tmp_path, document(), {}), rules.DEFAULT) if name.startswith("fim")]


@pytest.mark.parametrize(
    ("family", "given", "expected"),
    [
        (rules.LLAMA, {"add_prefix_space": True}, True),
        (rules.LLAMA, {"add_prefix_space": False}, True),  # the tokenizer does put one, whatever the config says
        (rules.LLAMA, {}, None),
        (rules.DEFAULT, {"add_prefix_space": True}, None),
    ],
)
def test_space_before_a_text(family: VocabularyRules, given: Json, expected: bool | None, tmp_path: Path) -> None:
    from tests.checkpoints import write_tiny_tokenizer

    write_tiny_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | given
    config = {name: value for name, value in config.items() if name != "add_prefix_space" or name in given}
    write_json(tmp_path / "tokenizer_config.json", config)
    assert read_vocabulary(tmp_path, 320, CHECK_TEXTS, family).add_space_prefix is expected
