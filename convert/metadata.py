"""Hparams and vocabulary to GGUF metadata, key for key what llama.cpp's converter writes.

Source: llama.cpp, conversion/base.py `set_gguf_parameters`, and the class of each architecture.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import yaml

from convert.checkpoint import Checkpoint, read_json
from convert.gguf_writer import TypedValue
from convert.vocabulary import Vocabulary
from convert.vocabulary_keys import add_vocabulary
from models.families import ModelFamily
from models.families.keys import COMMON
from models.hparams import Hparams

_VALUE_TYPES = {
    bool: gguf.GGUFValueType.BOOL,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
    str: gguf.GGUFValueType.STRING,
}


def build_metadata(
    checkpoint: Checkpoint,
    family: ModelFamily,
    hparams: Hparams,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    file_type: int,
    vocabulary: Vocabulary | None,
) -> Mapping[str, TypedValue]:
    """Every key of the file in its order. Without a vocabulary: enough for llama.cpp to read the tensors.

    Raises CheckpointError, UnsupportedError.
    """
    # Only collects: a writer without a path writes nothing.
    writer = gguf.GGUFWriter(path=None, arch=family.gguf_arch)
    writer.add_type(gguf.GGUFType.MODEL)
    add_general(writer, checkpoint.path, shapes)
    _add_hparams(writer, family, hparams)
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        if "vocab_size" not in family.keys:
            writer.add_vocab_size(hparams.integer("vocab_size"))
    else:
        add_vocabulary(writer, family.vocabulary, vocabulary)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(file_type)
    keys: Mapping[str, TypedValue] = writer.kv_data[0]
    return keys


def add_general(writer: gguf.GGUFWriter, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Name, licence, languages and recommended sampling, out of the model card and generation_config.json."""
    # gguf tells on its logger what it makes of the names; none of it is for the person who converts
    logging.getLogger("metadata").setLevel(logging.CRITICAL)
    try:
        metadata = gguf.Metadata.load(None, path, None, sum(map(math.prod, shapes.values())))
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError, TypeError, AttributeError, ValueError, KeyError):
        # A model card is prose with a header; a broken one costs the names, not the conversion.
        metadata = gguf.Metadata()
    metadata.name = str(metadata.name or path.resolve().name)
    metadata.size_label = metadata.size_label or _size_label(shapes)
    generation = read_json(path / "generation_config.json") or {}
    penalty = generation.get("penalty_repeat", generation.get("repetition_penalty"))
    metadata.sampling_penalty_repeat = penalty
    for name, value in list(vars(metadata).items()):
        if name.startswith("sampling_"):
            setattr(metadata, name, value if _is_sampling_value(name, value) else None)
        else:
            setattr(metadata, name, _card_value(value))
    metadata.set_gguf_meta_model(writer)


def _size_label(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """ "7B", or "8x7B" of a mixture of experts. `shapes`: of each tensor by name, outermost first."""
    experts = {name: shape for name, shape in shapes.items() if "_exps." in name and len(shape) > 1}
    counts = [shape[0] for shape in experts.values()]
    total = sum(map(math.prod, shapes.values()))
    one_expert = sum(math.prod(shape[1:]) for shape in experts.values())
    n_experts = sum(counts) // len(counts) if counts else 0
    shared = total - sum(map(math.prod, experts.values()))
    return gguf.size_label(total, shared, one_expert, n_experts) if total else None


def _card_value(value: Any) -> Any:
    """What GGUF can hold of a model card's field: a text, texts, or a list of objects of texts; None of all else."""
    if isinstance(value, list):
        if all(isinstance(item, dict) for item in value):
            return [{str(k): v for k, v in item.items() if isinstance(v, str)} for item in value] or None
        return [text for text in map(_card_text, value) if text is not None] or None
    return _card_text(value)


def _card_text(value: Any) -> str | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def _is_sampling_value(name: str, value: object) -> bool:
    if name == "sampling_sequence":
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 3.4e38:
        return False
    if name in ("sampling_top_k", "sampling_penalty_last_n", "sampling_mirostat"):
        return isinstance(value, int) and abs(value) < 2**31
    return True


def _add_hparams(writer: gguf.GGUFWriter, family: ModelFamily, hparams: Hparams) -> None:
    writer.add_block_count(family.n_blocks(hparams))
    for key, getter in {**COMMON, **family.keys}.items():
        value = getter(hparams)
        if value is None or value == []:
            continue
        full_key = key[1:] if key.startswith("/") else f"{family.gguf_arch}.{key}"
        if isinstance(value, list):
            writer.add_array(full_key, value)
        else:
            writer.add_key_value(full_key, value, _VALUE_TYPES[type(value)])
