"""LoRA adapters in PEFT form: what a fine-tune adds to the matrices of a checkpoint, as two thin matrices each.

Format: peft, `adapter_config.json` beside `adapter_model.safetensors` (or `.bin`); W' = W + scale * B @ A.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.checkpoint import read_header, read_json
from convert.stored import check_readable, stored
from convert.torch_file import read_torch_file
from models.errors import CheckpointError, TensorError, UnsupportedError
from models.families import Tensors
from models.rope import number_of
from models.text import printable
from models.weights import Index, Weights

_CONFIG = "adapter_config.json"
_WEIGHTS = {"adapter_model.safetensors": read_header, "adapter_model.bin": read_torch_file}
_PART = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.(?:lora_(?P<part>[AB])(?:\.[^.]+)?\.weight|lora_embedding_(?P<table>[AB])(?:\.[^.]+)?)"
)
_SAVED = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?:\.modules_to_save\.[^.]+)?(?:\.base_layer)?\.(?P<kind>weight|bias)"
)
# Variants of PEFT that compute otherwise than B @ A, with the values that switch them off.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA", None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
}


@dataclass(frozen=True)
class Delta:
    """What is added to one matrix [n_out, n_in] of the checkpoint: scale * b @ a.

    a          [rank, n_in]
    b          [n_out, rank]
    embedding  the matrix is a table of rows that are looked up
    """

    name: str
    a: Weights
    b: Weights
    scale: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """A directory with an adapter: its deltas by the name of the tensor they change, and tensors it replaces."""

    path: Path
    config: Mapping[str, Any]
    deltas: Mapping[str, Delta]
    replaced: Mapping[str, Weights]

    @property
    def alpha(self) -> float:
        return number_of("lora_alpha", self.config.get("lora_alpha"))


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter rather than a checkpoint."""
    return (path / _CONFIG).is_file()


def open_adapter(path: Path) -> Adapter:
    """Read the config and the header of an adapter. Raises CheckpointError, TensorError, UnsupportedError."""
    config = read_json(path / _CONFIG)
    if config is None:
        raise CheckpointError(f"{path} has no {_CONFIG}", hint="Give the folder of a PEFT adapter.", path=path)
    for name, plain in _PLAIN.items():
        if config.get(name) not in plain:
            raise UnsupportedError(
                f"{path / _CONFIG}: {name!r} is {printable(config.get(name), 80)}, which is no plain LoRA",
                hint="Merge it with peft (merge_and_unload), and convert the merged checkpoint.",
                field=name,
            )
    file = next((name for name in _WEIGHTS if (path / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{path} has no {' or '.join(_WEIGHTS)}", hint="Fetch the adapter again.", path=path)
    parts: dict[str, dict[str, Weights]] = {}
    tables: set[str] = set()
    replaced: dict[str, Weights] = {}
    for info in _WEIGHTS[file](path / file):
        weights = stored(info)
        check_readable(weights)
        if match := _PART.fullmatch(info.name):
            name = f"{match['module']}.weight"
            parts.setdefault(name, {})[match["part"] or match["table"]] = weights
            if match["table"]:
                tables.add(name)
        elif match := _SAVED.fullmatch(info.name):
            replaced[f"{match['module']}.{match['kind']}"] = weights
        else:
            raise UnsupportedError(f"tensor {printable(info.name)!r} in {info.path.name} is no part of a plain LoRA")
    if not parts:
        raise CheckpointError(f"{path / file} holds no LoRA matrices", path=path)
    deltas = {name: _delta(name, pair, config, table=name in tables) for name, pair in parts.items()}
    return Adapter(path, config, deltas, replaced)


def merged(tensors: Tensors, adapter: Adapter) -> Tensors:
    """The tensors of the checkpoint as the adapter changes them. Raises TensorError for one that is not there."""
    result = dict(tensors)
    for name, weights in adapter.replaced.items():
        if name in result and result[name].shape != weights.shape:
            raise _does_not_fit(adapter, name, weights.shape, result[name].shape)
        result[name] = weights
    for name, delta in adapter.deltas.items():
        if name not in tensors:
            raise TensorError(
                f"the adapter in {adapter.path} changes {printable(name)!r}, which the checkpoint does not have",
                hint="Is it an adapter of another model?",
                tensor=name,
            )
        if tensors[name].shape != delta.shape:
            raise _does_not_fit(adapter, name, delta.shape, tensors[name].shape)
        result[name] = _sum(result[name], delta)
    return result


def _sum(base: Weights, delta: Delta) -> Weights:
    def read(rows: Index, columns: slice) -> NDArray[np.float32]:
        b = delta.b.read(rows, slice(0, delta.rank))
        a = delta.a.read(np.arange(delta.rank), columns)
        return base.read(rows, columns) + np.float32(delta.scale) * (b @ a)

    return replace(base, dtype=None, read=read)


def _delta(name: str, pair: Mapping[str, Weights], config: Mapping[str, Any], *, table: bool) -> Delta:
    if pair.keys() != {"A", "B"} or any(len(part.shape) != 2 for part in pair.values()):
        raise TensorError(f"the adapter lacks one of the two matrices of {printable(name)!r}", tensor=name)
    # the row of a token is a column of A: b @ a is the table transposed
    a, b = (pair["B"].transposed(), pair["A"].transposed()) if table else (pair["A"], pair["B"])
    if config.get("fan_in_fan_out") and not table:  # beside a matrix that is stored with a column an output
        a, b = b.transposed(), a.transposed()
    if a.shape[0] != b.shape[1]:
        raise TensorError(
            f"the adapter's matrices of {printable(name)!r} are {list(a.shape)} and {list(b.shape)}: "
            "they have no rank in common",
            tensor=name,
        )
    module = name.removesuffix(".weight")
    rank = a.shape[0]
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha"))
    scale = number_of("lora_alpha", alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Delta(name, a, b, scale, embedding=table)


def _by_pattern(config: Mapping[str, Any], name: str, module: str, default: object) -> object:
    """A setting of this module, where the config has one for it. Source: peft, `get_pattern_key`."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"{_CONFIG}: {name!r} is no object", field=name)
    for pattern, value in patterns.items():
        # peft takes it for a regular expression; plain names with dots are what it writes, and all that is taken here
        if module == pattern or module.endswith(f".{pattern}"):
            return value
    return default


def _does_not_fit(adapter: Adapter, name: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> TensorError:
    return TensorError(
        f"the adapter in {adapter.path} has a {printable(name)!r} of {list(ours)}, the checkpoint of {list(theirs)}",
        hint="Is it an adapter of another model?",
        tensor=name,
    )
