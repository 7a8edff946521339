"""Every form in which a checkpoint may keep its vocabulary: read, and llama.cpp's ids held against the tokenizer's."""

from __future__ import annotations

import base64
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.check_texts import CHECK_TEXTS
from convert.documents import all_merges_of_ranks, merges_of_ranks, spelled
from convert.sentencepiece_model import load_sentencepiece
from convert.tiktoken_files import CL100K, QWEN
from convert.tokenizer import TokenType, Vocabulary, read_vocabulary
from convert.trial import make_trial
from convert.unigram import is_sound_charsmap
from models.errors import TokenizerError, UnsupportedError
from models.families import vocabulary as rules
from tests.checkpoints import Json, message_of, quick, write_json
from tests.mixed_text import mixed_lines
from tests.rank_merging import encode_by_rank
from tests.test_pretokenizer_search import trained

N_VOCAB = 3000


def assert_same_ids(vocabulary: Vocabulary, expected: dict[str, list[int]]) -> None:
    assert expected
    assert make_trial(vocabulary, expected).first_difference() is None


def ids_of(document: Json | str) -> dict[str, list[int]]:
    text = document if isinstance(document, str) else json.dumps(document)
    tokenizer = tokenizers.Tokenizer.from_str(text)
    plain = (line for line in mixed_lines() if "<s>" not in line and "<|" not in line)
    return {line: tokenizer.encode(line, add_special_tokens=False).ids for line in plain}


# SentencePiece: what the library says is right


@cache
def sentencepiece_model(kind: str, **options: Any) -> bytes:
    model = io.BytesIO()
    defaults: Json = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([part for line in mixed_lines() for part in line.split("\n") if part.strip()]),
        model_writer=model,
        vocab_size=1200,
        model_type=kind,
        character_coverage=0.99,
        num_threads=1,
        minloglevel=2,
        **(defaults | options),
    )
    return model.getvalue()


def sentencepiece_ids(model: bytes) -> dict[str, list[int]]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return {line: processor.EncodeAsIds(line) for line in mixed_lines()}


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("user_defined", [(), ("<tag>", "▁▁▁▁")])
def test_sentencepiece_bpe(prefix: bool, user_defined: tuple[str, ...], tmp_path: Path) -> None:
    model = sentencepiece_model("bpe", add_dummy_prefix=prefix, user_defined_symbols=",".join(user_defined))
    (tmp_path / "tokenizer.model").write_bytes(model)
    vocabulary = read_vocabulary(tmp_path, 1208, CHECK_TEXTS)
    assert (vocabulary.model, vocabulary.add_space_prefix) == ("llama", None if prefix else False)
    assert vocabulary.types.count(TokenType.USER_DEFINED) == len(user_defined)
    if not user_defined:
        assert_same_ids(vocabulary, sentencepiece_ids(model))


def test_sentencepiece_unigram_is_tried_in_both_forms(tmp_path: Path) -> None:
    model = sentencepiece_model("unigram", byte_fallback=False, remove_extra_whitespaces=True)
    (tmp_path / "tokenizer.model").write_bytes(model)
    vocabulary = read_vocabulary(tmp_path, 1200, CHECK_TEXTS)
    assert (vocabulary.model, vocabulary.remove_extra_whitespaces) == ("t5", True)
    assert_same_ids(vocabulary, sentencepiece_ids(model))


def test_what_the_file_says_of_its_normalizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model("unigram", normalization_rule_name="nmt_nfkc", add_dummy_prefix=False))
    read = load_sentencepiece(path)
    assert (read.model_type, read.add_dummy_prefix, read.remove_extra_whitespaces) == (1, False, False)
    assert len(read.precompiled_charsmap) > 100_000
    assert is_sound_charsmap(read.precompiled_charsmap)
    assert (len(read.pieces), read.types[:3]) == (1200, [2, 3, 3])


@pytest.mark.parametrize("kind", ["word", "char"])
def test_other_sentencepiece_models_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    options = {"byte_fallback": False, "hard_vocab_limit": False} if kind == "word" else {"byte_fallback": False}
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(kind, use_all_vocab=False, **options))
    with pytest.raises(UnsupportedError, match=r"is a (word|character) model of SentencePiece"):
        read_vocabulary(tmp_path, 60_000, ())


def test_tokens_of_a_family_after_the_pieces(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("bpe"))
    vocabulary = read_vocabulary(tmp_path, 1216, (), rules.CHATGLM3)
    assert vocabulary.tokens[1200:1210] == [text.encode() for text in rules.CHATGLM3.appended] + [b"[PAD1209]"]
    assert set(vocabulary.types[1200:1209]) == {TokenType.CONTROL}
    assert vocabulary.special.add == {"bos": False}


# tokenizer.json with byte fallback, without a prefix (Gemma), and unigram


def as_bpe_json(model: bytes) -> Json:
    """As transformers writes it: a merge for each way to make a piece, by score; a space is a mark, nothing before."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = {processor.IdToPiece(i): i for i in range(processor.vocab_size())}
    merges: list[tuple[float, list[str]]] = []
    for piece, i in pieces.items():
        if processor.IsByte(i) or processor.IsControl(i) or processor.IsUnknown(i):
            continue
        halves = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        known = sorted((pieces[a], pieces[b], a, b) for a, b in halves if a in pieces and b in pieces)
        merges += [(-processor.GetScore(i), [a, b]) for _, _, a, b in known]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": space,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": "<unk>",
            "vocab": pieces,
            "merges": [merge for _, merge in sorted(merges, key=lambda merge: merge[0])],
        },
    }


def test_byte_fallback_without_a_prefix(tmp_path: Path) -> None:
    document = as_bpe_json(sentencepiece_model("bpe", add_dummy_prefix=False))
    write_json(tmp_path / "tokenizer.json", document)
    vocabulary = read_vocabulary(tmp_path, 1200, CHECK_TEXTS, rules.GEMMA2)
    assert (vocabulary.model, vocabulary.add_space_prefix) == ("llama", False)
    assert vocabulary.special.add == {"bos": False}  # no post-processor puts one
    assert_same_ids(vocabulary, ids_of(document))


def test_gemma_4_has_a_vocabulary_of_its_own(tmp_path: Path) -> None:
    document = as_bpe_json(sentencepiece_model("bpe", add_dummy_prefix=False))
    document["added_tokens"] = [
        {"id": 1, "content": "<s>", "special": True},
        {"id": 1200, "content": "<|channel>", "special": True},
    ]
    for token in document["added_tokens"]:
        token |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    write_json(tmp_path / "tokenizer.json", document)
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<s>"})
    vocabulary = read_vocabulary(tmp_path, 1208, CHECK_TEXTS, rules.GEMMA4)
    assert (vocabulary.model, vocabulary.pre, vocabulary.add_space_prefix) == ("gemma4", None, False)
    assert (vocabulary.types[1200], vocabulary.special.add["bos"]) == (TokenType.USER_DEFINED, True)
    assert_same_ids(vocabulary, ids_of(document))


def test_merges_that_scores_cannot_say(tmp_path: Path) -> None:
    """A token made by a merge of low rank, whose parts another order would never leave apart."""
    document = as_bpe_json(sentencepiece_model("bpe", add_dummy_prefix=False))
    merges = document["model"]["merges"]
    document["model"]["merges"] = sorted(merges, key=lambda merge: (len("".join(merge)) > 3, merge[::-1]))
    write_json(tmp_path / "tokenizer.json", document)
    vocabulary = read_vocabulary(tmp_path, 1200, CHECK_TEXTS)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", "sarvam-moe")
    assert_same_ids(vocabulary, {text: ids for text, ids in ids_of(document).items() if "\n" not in text})


def test_unigram_json(tmp_path: Path) -> None:
    model = sentencepiece_model("unigram", byte_fallback=False, remove_extra_whitespaces=True)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    document: Json = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "post_processor": None,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {
            "type": "Unigram",
            "unk_id": 0,
            "byte_fallback": False,
            "vocab": [[processor.IdToPiece(i), processor.GetScore(i)] for i in range(1200)],
        },
    }
    write_json(tmp_path / "tokenizer.json", document)
    texts = [text for text in CHECK_TEXTS if not text.startswith(" ") and not text.endswith((" ", "\n"))]
    vocabulary = read_vocabulary(tmp_path, 1200, texts)
    assert (vocabulary.model, vocabulary.special.ids["unk"]) == ("t5", 0)
    assert vocabulary.special.add == {"eos": False}


def test_charsmaps_that_would_end_llama_cpp(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model("unigram", normalization_rule_name="nmt_nfkc"))
    good = load_sentencepiece(path).precompiled_charsmap
    size = int.from_bytes(good[:4], "little")
    assert is_sound_charsmap(b"")
    assert is_sound_charsmap(good)
    assert not is_sound_charsmap(good[:-1] + b"x")  # the last replacement has no end
    assert not is_sound_charsmap(good[: 4 + size])  # no replacements
    assert not is_sound_charsmap(b"\xff\xff\xff\x7f" + good[4:])
    assert not is_sound_charsmap((4).to_bytes(4, "little") + b"\x00\x00\xff\xff" + b"a\x00")


# tiktoken, tekken, vocab.json with merges.txt: the same BPE, written otherwise


@cache
def ranks() -> dict[bytes, int]:
    """Bytes and merged tokens by rank, out of the tokenizer that splits as Qwen's."""
    model = json.loads(trained("qwen2"))["model"]
    letters = {spelled(bytes([byte])): byte for byte in range(256)}
    pieces = [piece for piece in model["vocab"] if len(piece) == 1]
    pieces += list(dict.fromkeys("".join(merge) for merge in model["merges"]))
    return {bytes(letters[letter] for letter in piece): rank for rank, piece in enumerate(pieces)}


def tiktoken_lines() -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks().items())


def reference(pattern: str) -> dict[str, list[int]]:
    return encode_by_rank(ranks(), pattern, mixed_lines())


def test_qwen_tiktoken(tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(tiktoken_lines())
    n = len(ranks())
    vocabulary = read_vocabulary(tmp_path, n + 256, CHECK_TEXTS, rules.QWEN1)
    assert vocabulary.tokens[n : n + 3] == [b"<|endoftext|>", b"<|im_start|>", b"<|im_end|>"]
    assert vocabulary.tokens[n + 207 : n + 209] == [b"<|extra_204|>", b"[PAD%d]" % (n + 208)]
    assert vocabulary.special.ids == {"bos": n, "eos": n, "unk": n}
    assert_same_ids(vocabulary, reference(QWEN))


def test_tiktoken_whose_splitting_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_lines())
    with pytest.raises(UnsupportedError, match=r"tokenizer\.model does not say how a text is split"):
        read_vocabulary(tmp_path, 3100, ())


def test_tiktoken_known_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convert import pretokenizers, tiktoken_files

    (tmp_path / "tiktoken.model").write_bytes(tiktoken_lines())
    decoder = {str(len(ranks())): {"content": "<|end|>", "special": True}}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": decoder, "eos_token": "<|end|>"})

    def split_by(tokenizer: Any, *others: object) -> bool:
        return [text for text, _ in tokenizer.pre_tokenizer.pre_tokenize_str("1234")] == ["123", "4"]

    monkeypatch.setattr(tiktoken_files, "_is_known", split_by)
    vocabulary = read_vocabulary(tmp_path, 3100, CHECK_TEXTS)
    assert vocabulary.special.ids["eos"] == len(ranks())
    assert pretokenizers.PROBE_TEXT not in vocabulary.expected_ids
    assert_same_ids(vocabulary, reference(CL100K))


def tekken_document(pattern: str = QWEN, n_special: int = 30) -> Json:
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks().items()
    ]
    return {
        "config": {
            "pattern": pattern,
            "default_vocab_size": len(vocab) - 5 + n_special,  # the file may hold more than the model has
            "default_num_special_tokens": n_special,
            "version": "v3",
        },
        "vocab": vocab,
    }


def test_tekken(tmp_path: Path) -> None:
    write_json(tmp_path / "tekken.json", tekken_document())
    n = len(ranks()) - 5 + 30
    vocabulary = read_vocabulary(tmp_path, n, CHECK_TEXTS)
    assert vocabulary.tokens[:4] == [b"<unk>", b"<s>", b"</s>", b"[INST]"]
    assert (vocabulary.tokens[29], vocabulary.types[29]) == (b"<SPECIAL_29>", TokenType.CONTROL)
    assert vocabulary.special.ids == {"bos": 1, "eos": 2, "unk": 0, "pad": 11}
    assert vocabulary.special.add["bos"] is True
    known = {rank for rank in ranks().values() if rank < len(ranks()) - 5}
    expected = {text: [i + 30 for i in ids] for text, ids in reference(QWEN).items() if known.issuperset(ids)}
    assert len(expected) > 20
    assert_same_ids(vocabulary, expected)


def test_tekken_that_lists_its_special_tokens(tmp_path: Path) -> None:
    document = tekken_document()
    names = ["<unk>", "<s>", "</s>", "[THINK]"]
    document["special_tokens"] = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
    write_json(tmp_path / "tekken.json", document)
    vocabulary = read_vocabulary(tmp_path, 3100, ())
    assert vocabulary.tokens[3:5] == [b"[THINK]", b"<SPECIAL_4>"]
    assert "pad" not in vocabulary.special.ids


def write_vocab_merges(folder: Path, tokenizer_class: str) -> None:
    model = json.loads(trained("gpt-2" if "GPT2" in tokenizer_class else "qwen2"))["model"]
    write_json(folder / "vocab.json", model["vocab"] | {"<|endoftext|>": 3000})
    lines = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": tokenizer_class, "eos_token": "<|endoftext|>"})
    write_json(folder / "added_tokens.json", {"<tool>": 3001})


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_vocab_and_merges(tokenizer_class: str, tmp_path: Path) -> None:
    write_vocab_merges(tmp_path, tokenizer_class)
    vocabulary = read_vocabulary(tmp_path, 3010, CHECK_TEXTS)
    assert vocabulary.types[3000:3003] == [TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED]
    assert vocabulary.special.ids["eos"] == 3000
    assert_same_ids(vocabulary, ids_of(trained("gpt-2" if "GPT2" in tokenizer_class else "qwen2")))


def test_vocab_and_merges_of_an_unknown_class(tmp_path: Path) -> None:
    write_vocab_merges(tmp_path, "OddTokenizer")
    with pytest.raises(UnsupportedError, match="of a OddTokenizer, whose way of splitting a text is not known"):
        read_vocabulary(tmp_path, 3010, ())


@pytest.mark.parametrize(
    ("name", "message"),
    [("vocab.txt", "is a WordPiece tokenizer"), ("rwkv_vocab_v20230424.txt", "is the tokenizer of RWKV")],
)
def test_forms_that_are_not_read_are_refused_by_name(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(UnsupportedError, match=message):
        read_vocabulary(tmp_path, 10, ())


def test_the_merge_of_each_token() -> None:
    few = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"bc": 4, b"abc": 5, b"cba": 6}
    assert list(merges_of_ranks(few)) == [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c")]  # nothing makes "cba"
    assert list(all_merges_of_ranks(few)) == [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc"), (b"ab", b"c")]


# Nothing but named errors, whatever is in the files

scalars = st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=6)
junk = scalars | st.lists(scalars, max_size=1) | st.dictionaries(st.text(max_size=6), scalars, max_size=1)


@quick
@given(at=st.integers(0, 2000), byte=st.integers(0, 255))
def test_any_tiktoken(tmp_path: Path, at: int, byte: int) -> None:
    lines = bytearray(tiktoken_lines()[:2001])
    lines[at] = byte
    (tmp_path / "qwen.tiktoken").write_bytes(lines)
    assert message_of(lambda: read_vocabulary(tmp_path, 700, CHECK_TEXTS[:2])).isprintable()


@quick
@given(
    place=st.sampled_from(["config", "pattern", "default_vocab_size", "default_num_special_tokens", "vocab", "token"]),
    value=junk,
)
def test_any_tekken(tmp_path: Path, place: str, value: object) -> None:
    document = tekken_document()
    document["config"]["default_vocab_size"] = 330
    document["vocab"] = document["vocab"][:300]
    if place in ("config", "vocab"):
        document[place] = value
    elif place == "token":
        document["vocab"][7] = value
    else:
        document["config"][place] = value
    write_json(tmp_path / "tekken.json", document)
    assert message_of(lambda: read_vocabulary(tmp_path, 330, CHECK_TEXTS[:2])).isprintable()


@quick
@given(data=st.data())
def test_any_sentencepiece_model(tmp_path: Path, data: st.DataObject) -> None:
    model = bytearray(sentencepiece_model("unigram", byte_fallback=False))
    for _ in range(data.draw(st.integers(1, 4))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "tokenizer.model").write_bytes(model[: data.draw(st.sampled_from([len(model), len(model) // 2]))])
    assert message_of(lambda: read_vocabulary(tmp_path, 1300, CHECK_TEXTS[:2])).isprintable()


@quick
@given(place=st.sampled_from(["vocab", "piece", "score", "unk_id", "type", "normalizer"]), value=junk)
def test_any_unigram(tmp_path: Path, place: str, value: Any) -> None:
    vocab: list[Any] = [["<unk>", 0.0], *([f"▁{letter}", -3.0] for letter in "abcdef")]
    document: Json = {
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab},
    }
    if place == "piece":
        vocab[3][0] = value
    elif place == "score":
        vocab[3][1] = value
    elif place == "normalizer":
        document[place] = {"type": "Precompiled", "precompiled_charsmap": value}
    else:
        document["model"][place] = value
    write_json(tmp_path / "tokenizer.json", document)
    assert message_of(lambda: read_vocabulary(tmp_path, 20, CHECK_TEXTS[:2])).isprintable()


def test_a_token_twice_is_an_error_before_llama_cpp_sees_it(tmp_path: Path) -> None:
    document = json.loads(trained("gpt-2"))
    document["model"]["vocab"]["[PAD3001]"] = 3000
    write_json(tmp_path / "tokenizer.json", document)
    with pytest.raises(TokenizerError, match=r"has the token '\[PAD3001\]' twice"):
        read_vocabulary(tmp_path, 3010, ())


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, inner in list(items)[:6] for place in places(inner, (*at, key)))][:80]


@settings(quick, max_examples=30)
@given(data=st.data(), value=junk)
def test_any_byte_level_tokenizer(tmp_path: Path, data: st.DataObject, value: object) -> None:
    document = json.loads(trained("gpt-2"))
    place = data.draw(st.sampled_from(places(document)[1:]))
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    write_json(tmp_path / "tokenizer.json", document)
    assert message_of(lambda: read_vocabulary(tmp_path, 3010, CHECK_TEXTS[:2])).isprintable()
