"""What families do to tensors that no oracle can be asked about."""

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


def after_passes(architecture: str, tensors: dict[str, NDArray[Any]], **fields: int) -> dict[str, NDArray[np.float32]]:
    family = family_of(architecture)
    weights: dict[str, Weights] = {name: constant(name, values) for name, values in tensors.items()}
    for step in family.passes:
        weights = dict(step(weights, family.hparams({**CONFIG, **fields})))
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


@pytest.mark.parametrize(("n_vocab", "normalised"), [(64_000, False), (125_696, True)])
def test_the_output_of_baichuan_2_is_normalised(n_vocab: int, *, normalised: bool) -> None:
    """By its code beside the checkpoints; the matrix stands for one of as many rows, a row of zeros among them."""
    output = arrays(output=5)["output"]
    output[3] = 0
    found = after_passes("BaichuanForCausalLM", {"lm_head.weight": output}, vocab_size=n_vocab)["lm_head.weight"]
    lengths = np.linalg.norm(output.astype(np.float64), axis=1)
    lengths[3] = 1
    np.testing.assert_allclose(found, output / lengths[:, None] if normalised else output, rtol=1e-6)


def test_a_part_of_a_normalised_row_is_that_of_the_whole() -> None:
    output = constant("lm_head.weight", arrays(output=5)["output"])
    family = family_of("BaichuanForCausalLM")
    tensors: dict[str, Weights] = {"lm_head.weight": output}
    for step in family.passes:
        tensors = dict(step(tensors, family.hparams({**CONFIG, "vocab_size": 125_696})))
    found = tensors["lm_head.weight"]
    np.testing.assert_array_equal(found.read(np.array([4, 1]), slice(2, 5)), found.values()[[4, 1], 2:5])


@pytest.mark.parametrize(
    ("architecture", "embedding", "output"),
    [
        ("BaichuanForCausalLM", "model.embed_tokens.weight", "lm_head.weight"),
        ("XverseForCausalLM", "model.embed_tokens.weight", "lm_head.weight"),
        ("OrionForCausalLM", "model.embed_tokens.weight", "lm_head.weight"),
        ("InternLM2ForCausalLM", "model.tok_embeddings.weight", "output.weight"),
    ],
)
def test_an_embedding_that_serves_as_output_is_there_twice(architecture: str, embedding: str, output: str) -> None:
    """llama.cpp does not load these models without an output matrix."""
    values = arrays(embedding=5)["embedding"]
    for tied in (True, False):
        found = after_passes(architecture, {embedding: values}, tie_word_embeddings=tied, vocab_size=5)
        assert found.keys() == ({embedding, output} if tied else {embedding})
    np.testing.assert_array_equal(
        after_passes(architecture, {embedding: values}, tie_word_embeddings=True, vocab_size=5)[output], values
    )
