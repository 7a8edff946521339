"""Tokenizers of every kind into GGUF vocabularies: the ids of llama.cpp are those of the tokenizer that was read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from convert.check import CHECK_TEXTS
from convert.converter import plan_conversion
from convert.special_tokens import read_chat_template, read_special_tokens
from convert.tokenizer import TokenType, Vocabulary, read_vocabulary
from models.errors import TokenizerError, UnsupportedError
from models.native import open_vocabulary
from tests.checkpoints import (
    Json,
    edit_json,
    message_of,
    quick,
    tiny_checkpoint,
    tiny_tokenizer,
    write_json,
    write_tiny_tokenizer,
)

TEXTS = (
    *CHECK_TEXTS,
    "def f(x):\n    return x",
    "  two leading spaces, a tab\tand a\n\nblank line ",
    "the quick brown foxes' jumps",
    "请解释 Transformer 的注意力机制。",
)


def added_token(content: str, i: int, *, special: bool, normalized: bool = False) -> Json:
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": i, "content": content, "special": special, "normalized": normalized, **flags}


def padding(vocabulary: Vocabulary) -> int:
    return vocabulary.types.count(TokenType.UNUSED)


def ids_by_llama_cpp(checkpoint: Path, texts: tuple[str, ...]) -> list[list[int]]:
    """By the vocabulary of the file that the checkpoint is planned to become."""
    plan = plan_conversion(checkpoint)
    path = checkpoint / "vocabulary.gguf"
    with path.open("wb") as file:
        file.write(plan.header)
        file.truncate(plan.n_bytes)
    with open_vocabulary(path) as vocabulary:
        return [vocabulary.tokenize(text, add_special=False, parse_special=True) for text in texts]


# SentencePiece, and its form as tokenizer.json


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    """A BPE model of 420 pieces with byte fallback, as Llama 2 has it."""
    sentences = [
        "The quick brown fox jumps over the lazy dog, and the fox returns.",
        "请解释Transformer模型中的注意力机制是如何工作的。",
        "def f(x):\n    return x  # the fox",
        "Привет, как дела? Добрый день!",
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(sentences * 30),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def as_llama_2_json(model: bytes) -> Json:
    """tokenizer.json of a SentencePiece model, as transformers makes it: a merge for each way to make a piece."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = {processor.IdToPiece(i): i for i in range(processor.vocab_size())}
    merges = []
    for piece, i in pieces.items():
        if processor.IsByte(i) or processor.IsControl(i) or processor.IsUnknown(i):
            continue
        halves = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        known = sorted((pieces[a], pieces[b], a, b) for a, b in halves if a in pieces and b in pieces)
        merges += [(-processor.GetScore(i), f"{a} {b}") for _, _, a, b in known]
    document = tiny_tokenizer()
    document["model"]["vocab"] = pieces
    document["model"]["merges"] = [merge for _, merge in sorted(merges, key=lambda merge: merge[0])]
    return document


@pytest.fixture
def sentencepiece_checkpoint(tmp_path: Path, sentencepiece_model: bytes) -> Path:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", vocab_size=432)
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer.model").write_bytes(sentencepiece_model)
    return checkpoint


def test_sentencepiece_model(sentencepiece_checkpoint: Path, sentencepiece_model: bytes) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    expected = [processor.EncodeAsIds(text) for text in TEXTS]
    assert ids_by_llama_cpp(sentencepiece_checkpoint, TEXTS) == expected
    assert max(map(max, expected)) > 259 + 20  # pieces, not only bytes


def test_sentencepiece_types_and_padding(sentencepiece_checkpoint: Path) -> None:
    write_json(sentencepiece_checkpoint / "added_tokens.json", {"<tool>": 420})
    decoder = {"421": {"content": "<|im_end|>", "special": True}, "422": {"content": "▁mark", "special": False}}
    edit_json(
        sentencepiece_checkpoint / "tokenizer_config.json", lambda config: config.update(added_tokens_decoder=decoder)
    )
    read = read_vocabulary(sentencepiece_checkpoint, 432, ())
    assert read.types[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    assert read.types[3:259] == [TokenType.BYTE] * 256
    assert read.tokens[420:424] == [b"<tool>", b"<|im_end|>", b" mark", b"[PAD423]"]
    assert read.types[420:424] == [
        TokenType.USER_DEFINED,
        TokenType.CONTROL,
        TokenType.USER_DEFINED,
        TokenType.UNUSED,
    ]
    assert padding(read) == 9
    assert len(read.scores) == len(read.types) == len(read.tokens) == 432


def test_llama_2_json_without_its_model(tmp_path: Path, sentencepiece_model: bytes) -> None:
    document = as_llama_2_json(sentencepiece_model)
    document["added_tokens"] += [added_token("<|tool|>", 420, special=True), added_token("▁mark", 421, special=False)]
    checkpoint = tiny_checkpoint(tmp_path / "tiny", vocab_size=432)
    write_json(checkpoint / "tokenizer.json", document)
    reference = tokenizers.Tokenizer.from_str(json.dumps(document))
    texts = (*TEXTS, "a<|tool|>b")
    expected = [reference.encode(text, add_special_tokens=False).ids for text in texts]
    assert ids_by_llama_cpp(checkpoint, TEXTS) == expected[:-1]
    assert 420 in expected[-1]
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    assert expected[:-1] == [processor.EncodeAsIds(text) for text in TEXTS]


def test_model_that_is_no_sentencepiece(sentencepiece_checkpoint: Path) -> None:
    (sentencepiece_checkpoint / "tokenizer.model").write_bytes(b"\x00junk")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model is not a SentencePiece model"):
        read_vocabulary(sentencepiece_checkpoint, 432, ())


def test_model_with_more_pieces_than_the_embedding_has_rows(sentencepiece_checkpoint: Path) -> None:
    with pytest.raises(TokenizerError, match="has ids up to 419, but vocab_size is 400"):
        read_vocabulary(sentencepiece_checkpoint, 400, ())


# Byte-level BPE


def byte_level() -> Json:
    """A small GPT-2 like tokenizer: 256 letters, some merges, added tokens of each kind. 268 tokens."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    merges = ["t h", "th e", "Ġ the", "i n", "Ġ Ġ", "ä ½", "ä½ ł"]
    pieces = [*sorted(letters), *(merge.replace(" ", "") for merge in merges)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    n = len(pieces)
    return {
        "version": "1.0",
        "added_tokens": [
            added_token("<s>", n, special=True),
            added_token("</s>", n + 1, special=True),
            added_token("<think>", n + 2, special=False),
            added_token("<|turn|>", n + 3, special=False),
            added_token("▁tool", n + 4, special=False, normalized=True),
        ],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "byte_fallback": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges,
        },
    }


@pytest.fixture
def byte_level_checkpoint(tmp_path: Path) -> Path:
    """Nobody knows the hash of its ids: how it splits is searched."""
    checkpoint = tiny_checkpoint(tmp_path / "tiny", vocab_size=280)
    write_json(checkpoint / "tokenizer.json", byte_level())
    return checkpoint


def test_byte_level(byte_level_checkpoint: Path) -> None:
    reference = tokenizers.Tokenizer.from_file(str(byte_level_checkpoint / "tokenizer.json"))
    texts = (*TEXTS, "<s>the<think> in</s>你<|turn|>")
    expected = [reference.encode(text, add_special_tokens=False).ids for text in texts]
    assert ids_by_llama_cpp(byte_level_checkpoint, texts) == expected
    assert {263, 264, 265, 266} <= set(expected[-1])


def test_byte_level_types(byte_level_checkpoint: Path) -> None:
    read = read_vocabulary(byte_level_checkpoint, 280, ())
    assert read.types[:263] == [TokenType.NORMAL] * 263
    # <|turn|> looks special, whatever its flag says
    assert read.types[263:269] == [
        TokenType.CONTROL,
        TokenType.CONTROL,
        TokenType.USER_DEFINED,
        TokenType.CONTROL,
        TokenType.USER_DEFINED,
        TokenType.UNUSED,
    ]
    assert read.tokens[267:269] == [b" tool", b"[PAD268]"]
    assert (padding(read), read.scores, len(read.merges)) == (12, [], 7)


def test_merges_as_pairs_are_the_same(byte_level_checkpoint: Path) -> None:
    as_text = read_vocabulary(byte_level_checkpoint, 280, ()).merges
    edit_json(
        byte_level_checkpoint / "tokenizer.json",
        lambda t: t["model"].update(merges=[merge.split() for merge in t["model"]["merges"]]),
    )
    assert read_vocabulary(byte_level_checkpoint, 280, ()).merges == as_text


def test_splitting_that_llama_cpp_does_not_have_is_refused(tmp_path: Path) -> None:
    document = byte_level()
    at_every_e = {"type": "Split", "pattern": {"String": "e"}, "behavior": "Isolated", "invert": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [at_every_e, document["pre_tokenizer"]]}
    write_json(tmp_path / "tokenizer.json", document)
    with pytest.raises(
        UnsupportedError, match=r"no pre-tokenizer of llama\.cpp does: '.*', the nearest, parts"
    ) as raised:
        read_vocabulary(tmp_path, 280, ())
    assert "the" in str(raised.value.text)


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "WordLevel", "\x1b[2J"])
def test_other_models_are_refused_by_name(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = byte_level()
    document["model"]["type"] = kind
    write_json(tmp_path / "tokenizer.json", document)
    with pytest.raises(TokenizerError) as raised:
        read_vocabulary(tmp_path, 280, ())
    assert str(raised.value).isprintable()


# Broken tokenizers


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        read_vocabulary(tmp_path, 280, ())
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UnsupportedError, match=r"has vocab\.json but neither merges\.txt") as raised:
        read_vocabulary(tmp_path, 280, ())
    assert "AutoTokenizer" in raised.value.hint


@pytest.mark.parametrize("document", [[], {}, {"model": {}}, {"model": {"vocab": 3}}, {"model": []}, None])
def test_json_that_is_no_tokenizer(document: object, tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", document)
    with pytest.raises(TokenizerError, match="has no model with a vocabulary"):
        read_vocabulary(tmp_path, 280, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"].update(merges=[]), "has no merges"),
        (lambda t: t["model"]["vocab"].update(high=5000), "ids up to 5,000, but vocab_size is 320"),
        (lambda t: t["added_tokens"][0].update(id=2**40), "tokenizer"),
        (lambda t: t["model"]["vocab"].update(negative=-1), "tokenizer"),
        (lambda t: t.update(added_tokens=[{"id": 1}]), "tokenizer"),
        (lambda t: t["model"].update(merges=["no such pair"]), "is not a tokenizer"),
        (lambda t: t.update(pre_tokenizer={"type": "Nonsense\x1b[2J"}), "is not a tokenizer"),
    ],
)
def test_tokenizers_at_odds_with_themselves(change: Any, message: str, tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer.json", change)
    with pytest.raises(TokenizerError, match=message) as raised:
        read_vocabulary(tmp_path, 320, ())
    assert str(raised.value).isprintable()


def test_a_tokenizer_that_fails_when_it_is_used(tmp_path: Path) -> None:
    document = byte_level()
    del document["model"]["vocab"]["a"]
    document["model"]["unk_token"] = "absent"
    write_json(tmp_path / "tokenizer.json", document)
    with pytest.raises(TokenizerError, match=r"is not a tokenizer: .*absent"):
        read_vocabulary(tmp_path, 280, ())


def test_a_tokenizer_that_panics(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_tiny_tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer.json", lambda t: t["model"].update(continuing_subword_prefix="prefix"))
    with pytest.raises(TokenizerError, match="is not a tokenizer"):
        read_vocabulary(tmp_path, 320, ())
    capfd.readouterr()  # Rust writes to stderr itself


def test_fewer_tokens_than_rows_beyond_padding(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    assert padding(read_vocabulary(tmp_path, 316 + 1024, ())) == 1024
    with pytest.raises(TokenizerError, match="has 316 tokens for an embedding of 1,341 rows"):
        read_vocabulary(tmp_path, 316 + 1025, ())


# Special tokens: which, and whether a prompt begins or ends with them


def template(*single: str) -> Json:
    """A post-processor: "A" stands for the text, any other word for a special token."""

    def step(word: str) -> Json:
        return {"Sequence": {"id": "A", "type_id": 0}} if word == "A" else {"SpecialToken": {"id": word, "type_id": 0}}

    special = {word: {"id": word, "ids": [i], "tokens": [word]} for i, word in (enumerate(("<s>", "</s>"), 1))}
    single_steps = [step(word) for word in single]
    return {"type": "TemplateProcessing", "single": single_steps, "pair": [step("A")], "special_tokens": special}


BYTE_LEVEL = {"type": "ByteLevel"}
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("post_processor", "config", "add"),
    [
        (None, NAMED, {}),
        (template("<s>", "A"), NAMED, {"bos": True}),
        (template("<s>", "A", "</s>"), NAMED, {"bos": True, "eos": True}),
        (template("A", "</s>"), NAMED, {"eos": True}),
        (template("A"), NAMED, {}),
        (BYTE_LEVEL, NAMED, {"bos": False, "eos": False}),
        ({"type": "Sequence", "processors": [BYTE_LEVEL, template("<s>", "A")]}, NAMED, {"bos": True, "eos": False}),
        (None, {**NAMED, "add_bos_token": True, "add_eos_token": False}, {"bos": True, "eos": False}),
        (template("<s>", "A"), {**NAMED, "add_bos_token": False}, {"bos": True}),
        ({"type": "RobertaProcessing"}, NAMED, {"bos": True, "eos": True, "sep": True}),
    ],
)
def test_what_is_added_around_a_prompt(
    post_processor: Json | None, config: Json, add: dict[str, bool], tmp_path: Path
) -> None:
    document = tiny_tokenizer() | {"post_processor": post_processor}
    assert read_special_tokens(tmp_path, document, config).add == add


def test_ids_come_from_the_tokenizer_before_the_config(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"bos_token_id": 77, "eos_token_id": [5, 6], "pad_token_id": 9})
    config = {"bos_token": {"content": "<s>"}, "unk_token": "<unk>"}
    assert read_special_tokens(tmp_path, tiny_tokenizer(), config).ids == {"bos": 1, "eos": 5, "unk": 0, "pad": 9}


def test_ids_of_a_nested_config(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"text_config": {"eos_token_id": 4}})
    assert read_special_tokens(tmp_path, None, {}).ids == {"eos": 4}


@pytest.mark.parametrize("value", [-1, True, "2", 2**31, [], [[1]], 1.5])
def test_ids_that_are_none(value: object, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"eos_token_id": value})
    assert read_special_tokens(tmp_path, None, None).ids == {}


# The chat template


def test_template_places(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path, {}) is None
    write_json(tmp_path / "chat_template.json", {"chat_template": "from json"})
    assert read_chat_template(tmp_path, {}) == "from json"
    assert read_chat_template(tmp_path, {"chat_template": "from the config"}) == "from the config"
    (tmp_path / "chat_template.jinja").write_text("from jinja")
    assert read_chat_template(tmp_path, {"chat_template": "from the config"}) == "from jinja"


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert read_chat_template(tmp_path, {"chat_template": named}) == named
    (tmp_path / "chat_template.jinja").write_text("a")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("b")
    assert read_chat_template(tmp_path, {}) == named


@pytest.mark.parametrize("value", [3, {"a": "b"}, ["text"], [{"name": "a"}], [{"name": 1, "template": "b"}]])
def test_what_is_no_template(value: object, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="'chat_template' is neither a text nor a list of named texts"):
        read_chat_template(tmp_path, {"chat_template": value})


def test_template_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in message_of(lambda: read_chat_template(tmp_path, {}))


# Nothing but named errors, whatever is in the files


def test_what_is_altered_below_is_sound(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer_config.json", CONFIG)
    write_json(tmp_path / "tokenizer.json", FULL)
    assert read_vocabulary(tmp_path, 320, ()).special.add == {"bos": True}


values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=6), inner, max_size=2),
    max_leaves=4,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value; of long lists and objects only the first few."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, inner in list(items)[:12] for place in places(inner, (*at, key)))]


def replaced(document: Any, place: tuple[Any, ...], value: object) -> Any:
    if not place:
        return value
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return document


FULL = tiny_tokenizer() | {"post_processor": template("<s>", "A")}
CONFIG = {
    **NAMED,
    "add_bos_token": True,
    "added_tokens_decoder": {"1": {"content": "<s>", "special": True}},
    "chat_template": [{"name": "default", "template": "x"}],
    "add_prefix_space": True,
}


@quick
@given(place=st.sampled_from(places(FULL)), value=values)
def test_any_tokenizer(tmp_path: Path, place: tuple[Any, ...], value: object) -> None:
    write_json(tmp_path / "tokenizer_config.json", NAMED)
    write_json(tmp_path / "tokenizer.json", replaced(json.loads(json.dumps(FULL)), place, value))
    assert message_of(lambda: read_vocabulary(tmp_path, 320, CHECK_TEXTS[:2])).isprintable()


@quick
@given(place=st.sampled_from(places(CONFIG)), value=values)
def test_any_tokenizer_config(tmp_path: Path, place: tuple[Any, ...], value: object) -> None:
    write_tiny_tokenizer(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", replaced(json.loads(json.dumps(CONFIG)), place, value))
    assert message_of(lambda: read_vocabulary(tmp_path, 320, CHECK_TEXTS[:2])).isprintable()


def test_a_template_does_not_bring_another_file_in(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "snapshots" / "1")
    secret = tmp_path / "secret"
    secret.write_text("private")
    blob = tmp_path / "blobs" / "abc"
    blob.parent.mkdir()
    blob.write_text("{{ messages }}")
    template = checkpoint / "chat_template.jinja"
    template.unlink(missing_ok=True)
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    template.symlink_to(secret)
    with pytest.raises(TokenizerError, match="leads out of the checkpoint"):
        read_chat_template(checkpoint, config)
    template.unlink()
    template.symlink_to("../../blobs/abc")  # as the hub's cache keeps it
    assert read_chat_template(checkpoint, config) == "{{ messages }}"
