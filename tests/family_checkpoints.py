"""Tiny random checkpoints of every family, as a table: what the converter is held against transformers with.

A `Case` is data. transformers makes its checkpoint, or, for a family that it lacks, the case's own `write` does; so
with the logits to expect. The table is in `tests/family_cases_*.py`, by kin; `CASES` is all of it.
"""

from __future__ import annotations

import dataclasses
import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.checkpoints import write_qwen2_tokenizer
from tests.checkpoints import INDEX, Json, edit_json, tiny_tokenizer, write_json, write_starter_tokenizer

__all__ = ["TEXT", "Case", "Refusal", "expected_ids", "expected_logits", "make_checkpoint", "write_tokenizer"]

Tokenizer = Literal["bpe", "glm", "phi4", "qwen", "sentencepiece", "gemma", "gemma4"]
VOCABULARY: Mapping[Tokenizer, int] = {
    "bpe": 49_152,
    "glm": 49_152,
    "phi4": 49_152,
    "qwen": 151_936,
    "sentencepiece": 384,
    "gemma": 384,
    "gemma4": 316,
}

TEXT = (
    "The attention mechanism weighs words. 请解释注意力机制。 Der Müller mahlt, was man ihm bringt. "
    "def f(x):\n    return x * 17 🙂 Мельница мелет зерно. Les moulins tournent au vent, et la farine coule; "
    "in the evening the miller counts his sacks and writes down what each of them weighs."
)
"""With every tokenizer longer than the sliding windows and the original contexts of the table."""

BASE: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""What a config has unless its case says otherwise, if its class knows the field and has a value for it."""

# Buffers that training changes: left at zero or one they would hide a mistake.
_TRAINED_BUFFERS = ("e_score_correction_bias", "expert_bias", "layer_scalar")


@dataclass(frozen=True)
class Case:
    """One tiny checkpoint.

    architecture  the name in config.json, which is that of the class in transformers unless `model_class` is given
    config        arguments of the config class, over `BASE`; a mapping for a field such as text_config is filled
                  from `BASE` too
    edit          changes config.json after transformers wrote it, into what repositories on the hub have
    adjust        changes the model before it is saved
    beside        further tensors of the checkpoint, which transformers leaves alone, out of those that it wrote
    text_part     the part of a multimodal model that reads a text alone, where the whole cannot
    peer_options  of llama.cpp's converter
    approximated  why llama.cpp computes something else whatever the file says
    write         writes config.json and the weights of a family that transformers lacks
    logits        its forward pass: folder, ids -> [n_ids, n_vocab]
    """

    architecture: str
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer = "bpe"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    model_class: str = ""
    seed: int = 1
    edit: Callable[[Json], object] | None = None
    adjust: Callable[[Any], object] | None = None
    beside: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    text_part: str = ""
    peer_options: tuple[str, ...] = ()
    approximated: str = ""
    write: Callable[[Path], None] | None = None
    logits: Callable[[Path, Sequence[int]], NDArray[np.float32]] | None = None


@dataclass(frozen=True)
class Refusal:
    """A checkpoint that llama.cpp would compute otherwise: refused, by the name of the field."""

    case: Case
    field: str


def make_checkpoint(case: Case, folder: Path, starter: Path) -> None:
    """Write the checkpoint of `case`, the same every time, in several shards where transformers makes it."""
    folder.mkdir(parents=True)
    write_tokenizer(case.tokenizer, folder, starter)
    if case.write:
        case.write(folder)
        return
    import torch
    import transformers

    model_class = getattr(transformers, case.model_class or case.architecture)
    config = _config(model_class.config_class, case.config, VOCABULARY[case.tokenizer])
    torch.manual_seed(case.seed)
    model = model_class(config)
    _perturb(model)
    if case.adjust:
        with torch.no_grad():
            case.adjust(model)
    with warnings.catch_warnings():  # of complex buffers, which are not saved
        warnings.simplefilter("ignore")
        model.to(getattr(torch, case.dtype))
    model.save_pretrained(folder, max_shard_size="256KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    edit_json(folder / "config.json", lambda fields: fields.update(architectures=[case.architecture]))
    if case.edit:
        edit_json(folder / "config.json", case.edit)
    if case.beside:
        _write_beside(case.beside, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def _write_beside(make: Callable[[dict[str, Any]], dict[str, Any]], folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    shards = [load_file(path) for path in sorted(folder.glob("model-*.safetensors"))]
    tensors = make({name: tensor for shard in shards for name, tensor in shard.items()})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model-beside.safetensors")
    edit_json(
        folder / INDEX, lambda index: index["weight_map"].update(dict.fromkeys(tensors, "model-beside.safetensors"))
    )


def _config(config_class: Any, fields: Mapping[str, Any], n_vocab: int) -> Any:
    import transformers

    if config_class is transformers.AutoConfig:
        config_class = transformers.CONFIG_MAPPING[fields["model_type"]]
    defaults = {item.name: item.default for item in dataclasses.fields(config_class)}
    spelt = config_class.attribute_map
    base = {
        name: value
        for name, value in {**BASE, "vocab_size": n_vocab}.items()
        if spelt.get(name, name) in defaults and (name != "head_dim" or isinstance(defaults.get(name), int))
    }
    given = {
        name: _config(config_class.sub_configs[name], value, n_vocab).to_dict()
        if name in config_class.sub_configs and name != "vision_config" and isinstance(value, Mapping)
        else value
        for name, value in fields.items()
    }
    return config_class(**{spelt.get(name, name): value for name, value in {**base, **given}.items()})


def _perturb(model: Any) -> None:
    """Norms of one, biases of zero, matrices left empty and attention that is nearly even would hide a mistake."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif parameter.std() < 0.01:
            parameter.data = 0.08 * torch.randn_like(parameter)
        if ".q_proj." in name or ".k_proj." in name:
            parameter.data *= 3
    for name, buffer in model.named_buffers():
        if name.endswith(_TRAINED_BUFFERS):
            buffer += 0.1 * torch.randn_like(buffer)


def expected_ids(folder: Path) -> list[int]:
    """The ids of `TEXT`, by the tokenizer's own library."""
    if (folder / "tokenizer.model").exists():
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return [processor.bos_id(), *processor.EncodeAsIds(TEXT)]
    from tokenizers import Tokenizer as Reader

    ids: list[int] = Reader.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    return ids


def expected_logits(case: Case, folder: Path, ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits [n_ids, n_vocab] of a checkpoint that `make_checkpoint` wrote, in float32."""
    if case.logits:
        return case.logits(folder, ids)
    import torch
    import transformers

    model_class = getattr(transformers, case.model_class or case.architecture)
    model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    if case.text_part:
        model = getattr(model, case.text_part)
    with torch.no_grad():
        logits: NDArray[np.float32] = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
    assert math.isfinite(float(logits.sum()))
    return logits


# Tokenizers


def write_tokenizer(kind: Tokenizer, folder: Path, starter: Path) -> None:
    """The files of a real tokenizer, of `VOCABULARY[kind]` tokens at most."""
    if kind in ("bpe", "glm", "phi4"):
        write_starter_tokenizer(folder, starter)
        name = "GPT2Tokenizer" if kind == "phi4" else "PreTrainedTokenizerFast"
        edit_json(folder / "tokenizer_config.json", lambda fields: fields.update(tokenizer_class=name))
        if kind == "glm":
            _rename_tokens(folder, _GLM_TOKENS)
    elif kind == "qwen":
        write_qwen2_tokenizer(folder)
    elif kind == "gemma4":
        write_json(folder / "tokenizer.json", _gemma4_tokenizer())
        write_json(folder / "tokenizer_config.json", _MARKS | {"tokenizer_class": "PreTrainedTokenizerFast"})
    else:
        (folder / "tokenizer.model").write_bytes(_sentencepiece(add_prefix=kind == "sentencepiece"))
        settings = {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer"}
        write_json(folder / "tokenizer_config.json", _MARKS | settings)


_MARKS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GLM_TOKENS = {"<repo_name>": "[gMASK]", "<reponame>": "<|user|>", "<file_sep>": "<|observation|>"}


def _rename_tokens(folder: Path, names: Mapping[str, str]) -> None:
    def rename(tokenizer: Json) -> None:
        for token in tokenizer["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        vocabulary = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = {names.get(piece, piece): i for piece, i in vocabulary.items()}

    edit_json(folder / "tokenizer.json", rename)


def _gemma4_tokenizer() -> Json:
    """Byte fallback out of a tokenizer.json alone, with no added prefix, and a mark at the beginning."""
    tokenizer = tiny_tokenizer()
    tokenizer["normalizer"] = tokenizer["normalizer"]["normalizers"][1]
    steps = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    tokenizer["decoder"] = {"type": "Sequence", "decoders": steps}
    mark = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [mark, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [mark, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return tokenizer


@cache
def _sentencepiece(*, add_prefix: bool) -> bytes:
    """A small model with byte fallback; without its added prefix it reads a text as Gemma's do."""
    import sentencepiece

    latin = "".join(letter for letter in TEXT if letter < "\u0250")  # the rest falls back to bytes
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(latin.splitlines()),
        model_writer=written,
        vocab_size=VOCABULARY["sentencepiece"],
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        add_dummy_prefix=add_prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return written.getvalue()
