"""Matrices that some checkpoints keep in one come apart into those that others keep apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.families import family_of
from models.weights import Weights, constant

CONFIG = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "head_dim": 2}
LAYER = "model.layers.0"


def arrays(**rows: int) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(1)
    return {name: random.standard_normal((n, 8)).astype(np.float32) for name, n in rows.items()}


def after_passes(architecture: str, tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    family = family_of(architecture)
    weights: dict[str, Weights] = {name: constant(name, values) for name, values in tensors.items()}
    for step in family.passes:
        weights = dict(step(weights, family.hparams(CONFIG)))
    return {name: tensor.values() for name, tensor in weights.items()}


@pytest.mark.parametrize("root", ["ernie", "model"])
def test_ernie_for_paddle(root: str) -> None:
    parts = arrays(q_proj=8, k_proj=4, v_proj=4, gate_proj=6, up_proj=6)
    attention, network = [parts[f"{part}_proj"] for part in "qkv"], [parts["gate_proj"], parts["up_proj"]]
    fused = {
        f"{root}.layers.0.self_attn.qkv_proj.weight": np.concatenate(attention),
        f"{root}.layers.0.mlp.up_gate_proj.weight": np.concatenate(network),
    }
    expected = {f"{LAYER}.{'self_attn' if name[0] in 'qkv' else 'mlp'}.{name}.weight": parts[name] for name in parts}
    found = after_passes("Ernie4_5ForCausalLM", fused)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
