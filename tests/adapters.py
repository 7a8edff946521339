"""LoRA adapters in the form that peft writes, for a checkpoint of random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints import write_json, write_safetensors

Tensors = Mapping[str, NDArray[Any]]


def write_adapter(folder: Path, shapes: Mapping[str, tuple[int, int]], rank: int = 4, **config: Any) -> Tensors:
    """An adapter of the modules in `shapes` ([n_out, n_in]); what it adds to each by name, [n_out, n_in]."""
    folder.mkdir(parents=True)
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 16,
        "bias": "none",
        "use_dora": False,
    } | config
    write_json(folder / "adapter_config.json", fields)
    random = np.random.default_rng(7)
    tensors, deltas = {}, {}
    scale = fields["lora_alpha"] / (rank**0.5 if fields.get("use_rslora") else rank)
    for module, (n_out, n_in) in shapes.items():
        a = random.normal(0, 0.1, (rank, n_in)).astype(np.float32)
        b = random.normal(0, 0.1, (n_out, rank)).astype(np.float32)
        if "embed" in module:  # a table: peft keeps its transposes
            tensors[f"base_model.model.{module}.lora_embedding_A"] = b.T
            tensors[f"base_model.model.{module}.lora_embedding_B"] = a.T
        else:
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
        deltas[f"{module}.weight"] = np.float32(scale) * (b @ a)
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", contiguous)
    return deltas
