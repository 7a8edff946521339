"""Converted files against llama.cpp's own converter and quantizer, and against transformers in float32."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from benchmarks.checkpoints import write_qwen2_tokenizer
from convert.converter import convert_checkpoint
from convert.file_types import FILE_TYPES, file_type
from models.gguf_file import LazyArray, read_gguf
from models.native import forward_pass, open_vocabulary
from tests.peer import need_peer, peer_convert, peer_quantize

pytestmark = pytest.mark.parity

TEXT = "The attention mechanism weighs words. 请解释注意力机制。 def f(x):\n    return x 🙂"
NAMES = ("general.name", "general.basename", "general.finetune", "general.version", "general.description")


@pytest.fixture(scope="module", autouse=True)
def _oracles() -> None:
    need_peer()


@pytest.fixture(scope="module")
def tokenizers_folder(tmp_path_factory: pytest.TempPathFactory, starter_model: Path) -> Path:
    """A folder for each kind of tokenizer: byte-level BPE, SentencePiece, and Llama-2 style tokenizer.json."""
    from transformers import AutoTokenizer, LlamaTokenizerFast

    root = tmp_path_factory.mktemp("tokenizers")
    AutoTokenizer.from_pretrained(starter_model.parent, gguf_file=starter_model.name).save_pretrained(root / "bpe")
    wheel_folder = root / "wheel"
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheel_folder), "mistral-common"],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    sentencepiece = root / "sentencepiece"
    sentencepiece.mkdir()
    with zipfile.ZipFile(next(wheel_folder.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith("data/tokenizer.model.v1"))
        (sentencepiece / "tokenizer.model").write_bytes(wheel.read(member))
    (sentencepiece / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "add_bos_token": True,
                "add_eos_token": False,
            }
        )
    )
    fast = LlamaTokenizerFast.from_pretrained(sentencepiece)
    fast.save_pretrained(root / "llama2")
    (root / "llama2" / "tokenizer.model").unlink(missing_ok=True)
    (root / "qwen").mkdir()
    write_qwen2_tokenizer(root / "qwen")
    return root


ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

# Scaled within the length of the text, so that the logits show it; torch rounds two of its factors otherwise.
LLAMA3_SHORT = ROPE["llama3"] | {"original_max_position_embeddings": 64}

# name: model class, tokenizer, dtype, config
CHECKPOINTS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama-tied": ("Llama", "bpe", "bfloat16", {"tie_word_embeddings": True}),
    "llama-untied-f16": ("Llama", "sentencepiece", "float16", {}),
    "llama-llama2-json": ("Llama", "llama2", "bfloat16", {}),
    "llama-f32": ("Llama", "bpe", "float32", {}),
    "llama-llama3-rope": ("Llama", "bpe", "bfloat16", {"rope_parameters": ROPE["llama3"], "head_dim": 128}),
    "llama-llama3-short": ("Llama", "bpe", "bfloat16", {"rope_parameters": LLAMA3_SHORT, "head_dim": 128}),
    "llama-linear-rope": ("Llama", "bpe", "bfloat16", {"rope_parameters": ROPE["linear"]}),
    "llama-bias": ("Llama", "bpe", "bfloat16", {"attention_bias": True, "mlp_bias": False}),
    "llama-v4-spelling": ("Llama", "bpe", "bfloat16", {"rope_parameters": ROPE["llama3"], "num_key_value_heads": 4}),
    "llama-v4-linear": ("Llama", "llama2", "bfloat16", {"rope_parameters": ROPE["linear"]}),
    "mistral": ("Mistral", "sentencepiece", "bfloat16", {"sliding_window": None}),
    "qwen2": ("Qwen2", "qwen", "bfloat16", {"tie_word_embeddings": True}),
    "qwen2-yarn-f32": ("Qwen2", "qwen", "float32", {"rope_parameters": ROPE["yarn"]}),
}


def make_checkpoint(name: str, folder: Path, tokenizers_folder: Path) -> None:
    import torch
    import transformers

    family, tokenizer, dtype, config = CHECKPOINTS[name]
    shutil.copytree(tokenizers_folder / tokenizer, folder)
    n_vocab = {"bpe": 49152, "qwen": 151936}.get(tokenizer, 32000)
    torch.manual_seed(1)
    settings = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.08,
        "vocab_size": n_vocab,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model_config = getattr(transformers, f"{family}Config")(**{**settings, **config})
    model = getattr(transformers, f"{family}ForCausalLM")(model_config)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases and norms of zero and one would hide a mistake
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="8MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    if name == "qwen2":
        add_model_card(folder)
    if "v4" in name:
        spell_as_transformers_4(folder)


def add_model_card(folder: Path) -> None:
    """What repositories on the hub have beside the weights: a card, and a recommended sampling."""
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlicense_link: https://example.org/license\nlanguage:\n- en\n- zh\n- no\n"
        "pipeline_tag: text-generation\nbase_model: Kin/Small-0.5B\ntags:\n- chat\ndatasets:\n- kin/texts\n"
        "library_name: transformers\n---\n# Small 0.5B Instruct\n\nA model card.\n"
    )
    sampling = {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643], **sampling}))


def spell_as_transformers_4(folder: Path) -> None:
    """Rewrite config.json as transformers 4 wrote it, and leave out what Llama 1 left out."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    if theta != 10000.0:
        config["rope_theta"] = theta
    config["rope_scaling"] = rope | ({"type": kind} if kind == "linear" else {"rope_type": kind})
    config["torch_dtype"] = config.pop("dtype")
    for name in ("head_dim", "attention_bias", "mlp_bias"):
        config.pop(name, None)
    if config["num_key_value_heads"] == config["num_attention_heads"]:
        del config["num_key_value_heads"]
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizers_folder: Path
) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("checkpoint") / request.param
    make_checkpoint(request.param, folder, tokenizers_folder)
    yield folder
    shutil.rmtree(folder)


def read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    file = read_gguf(path)
    data = path.read_bytes()
    keys = {k: list(v) if isinstance(v, LazyArray) else v for k, v in file.metadata.items() if k not in NAMES}
    return keys, {t.name: (t.type, t.shape, data[t.offset : t.offset + t.nbytes]) for t in file.tensors}


@pytest.mark.parametrize("checkpoint", [name for name in CHECKPOINTS if "short" not in name], indirect=True)
def test_equals_the_two_steps_of_llama_cpp(checkpoint: Path, tmp_path: Path) -> None:
    ours, theirs, step = tmp_path / "ours.gguf", tmp_path / "theirs.gguf", tmp_path / "step.gguf"
    convert_checkpoint(checkpoint, ours, file_type("Q4_K_M"))
    peer_convert(checkpoint, step, "f32" if "f32" in checkpoint.name else "auto")
    peer_quantize(step, theirs, "Q4_K_M")
    our_keys, our_tensors = read(ours)
    their_keys, their_tensors = read(theirs)
    assert list(our_tensors) == list(their_tensors)
    for name, tensor in our_tensors.items():
        assert tensor == their_tensors[name], name
    if CHECKPOINTS[checkpoint.name][1] == "llama2":  # a row of the table in convert/README.md
        assert our_keys.pop("tokenizer.ggml.scores") != their_keys.pop("tokenizer.ggml.scores")
    assert our_keys == their_keys


@pytest.mark.parametrize("checkpoint", list(CHECKPOINTS), indirect=True)
def test_logits_are_those_of_transformers(checkpoint: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = tmp_path / "ours.gguf"
    convert_checkpoint(checkpoint, ours, file_type("F32"))
    if (checkpoint / "tokenizer.model").exists():  # transformers 5 makes other ids of it than SentencePiece itself
        processor = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model"))
        ids = [processor.bos_id(), *processor.EncodeAsIds(TEXT)]
    else:
        ids = AutoTokenizer.from_pretrained(checkpoint)(TEXT)["input_ids"]
    with open_vocabulary(ours) as vocabulary:
        assert vocabulary.tokenize(TEXT, add_special=True, parse_special=True) == ids
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].numpy()
    logits = forward_pass(ours, ids, threads=2)
    cosine = float(logits @ expected / (np.linalg.norm(logits) * np.linalg.norm(expected)))
    assert cosine > 0.9999
    assert logits.argmax() == expected.argmax()


@pytest.mark.parametrize("checkpoint", ["llama-tied"], indirect=True)
def test_every_type_equals_llama_quantize(checkpoint: Path, tmp_path: Path) -> None:
    step = tmp_path / "step.gguf"
    peer_convert(checkpoint, step)
    for kind in FILE_TYPES.values():
        if kind.needs_matrix:
            continue
        ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
        convert_checkpoint(checkpoint, ours, kind, check=False, force=True)
        peer_quantize(step, theirs, kind.name)
        assert ours.read_bytes() == theirs.read_bytes(), kind.name
