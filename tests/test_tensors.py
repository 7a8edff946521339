"""The tensor plan: GGUF names, the order of rotary rows, and what does not belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.checkpoint import TensorInfo
from convert.stored import stored
from convert.tensors import TensorPlan, plan_tensors
from models.errors import CheckpointError, TensorError, UnsupportedError
from models.families import family_of
from tests.checkpoints import tiny_config, tiny_tensors


def plan(
    architecture: str = "LlamaForCausalLM", change: dict[str, tuple[int, ...] | None] | None = None, **fields: Any
) -> dict[str, TensorPlan]:
    """The plan of a tiny checkpoint, by GGUF name. `change`: tensors with other shapes; None takes one away."""
    config = tiny_config(architecture, **fields)
    shapes = {name: array.shape for name, array in tiny_tensors(config).items()} | (change or {})
    tensors = {
        name: stored(TensorInfo(name, "BF16", shape, Path("s"), 0, 0))
        for name, shape in shapes.items()
        if shape is not None
    }
    family = family_of(architecture)
    plans = plan_tensors(tensors, family, family.hparams(config))
    assert len({entry.name for entry in plans}) == len(plans)
    return {entry.name: entry for entry in plans}


def test_every_tensor_gets_the_name_of_llama_cpp() -> None:
    plans = plan(num_hidden_layers=1)
    assert {name: entry.weights.name for name, entry in plans.items()} == {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
        "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
        "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "blk.0.attn_k.weight": "model.layers.0.self_attn.k_proj.weight",
        "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj.weight",
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }


def test_norms_and_biases_stay_f32() -> None:
    plans = plan("Qwen2ForCausalLM")
    kept = {name for name, entry in plans.items() if entry.keep_f32}
    assert kept == {name for name in plans if "norm" in name or name.endswith(".bias")}


def test_buffers_that_follow_from_the_config_are_left_out() -> None:
    plain = plan()
    assert plan(change={"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}).keys() == plain.keys()


def test_embeddings_may_serve_as_the_output() -> None:
    assert "output.weight" not in plan(tie_word_embeddings=True)


def test_an_output_of_its_own_is_kept_though_the_config_ties_it() -> None:
    assert "output.weight" in plan(tie_word_embeddings=True, change={"lm_head.weight": (320, 64)})


def test_llama3_factors() -> None:
    """By their definition: short waves stay, long ones are divided by the factor, between them it slides."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = plan(rope_parameters=rope, head_dim=64)["rope_freqs.weight"].weights.values()
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(0, 64, 2) / 64)
    assert factors.shape == (32,)
    assert (factors[wavelengths < 8192 / 4] == 1).all()
    assert (factors[wavelengths > 8192] == 32).all()
    between = (wavelengths > 8192 / 4) & (wavelengths < 8192)
    smooth = (8192 / wavelengths[between] - 1) / 3
    np.testing.assert_allclose(factors[between], 1 / ((1 - smooth) / 32 + smooth), rtol=1e-5)
    assert between.any()


@pytest.mark.parametrize(
    "fields",
    [
        {"factor": 0},
        {"factor": -8.0},
        {"low_freq_factor": 5.0},
        {"original_max_position_embeddings": 0},
        {"rope_theta": 0},
        {"rope_theta": -1.0},
        {"rope_theta": 1e-300},
    ],
    ids=str,
)
def test_llama3_factors_that_make_no_sense(fields: dict[str, float]) -> None:
    with pytest.raises(CheckpointError, match="llama3 rope factors"):
        plan(rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0} | fields)


# What does not belong


def test_tensor_that_nobody_asked_for() -> None:
    with pytest.raises(TensorError, match=r"'model\.layers\.0\.self_attn\.q_norm\.weight' in s has no place in a"):
        plan(change={"model.layers.0.self_attn.q_norm.weight": (16,)})


def test_more_blocks_than_the_config_says() -> None:
    with pytest.raises(TensorError, match=r"'model\.layers\.2\..*' in s has no place .* of 2 blocks"):
        plan(change={"model.layers.2.input_layernorm.weight": (64,)})


def test_one_tensor_under_two_names() -> None:
    with pytest.raises(TensorError, match=r"'transformer\.wte\.weight' is there twice, as token_embd\.weight"):
        plan(change={"transformer.wte.weight": (320, 64)})


def test_no_embedding() -> None:
    with pytest.raises(TensorError, match="has no token embedding"):
        plan(change={"model.embed_tokens.weight": None})


def test_embedding_of_another_vocabulary() -> None:
    with pytest.raises(TensorError, match=r"'model\.embed_tokens\.weight' has 320 rows, vocab_size is 321"):
        plan(vocab_size=321, change={"model.embed_tokens.weight": (320, 64)})


def test_no_output_though_it_is_not_tied() -> None:
    with pytest.raises(TensorError, match=r"'lm_head\.weight' is missing, and config\.json does not tie it"):
        plan(change={"lm_head.weight": None})


def test_rows_that_the_heads_do_not_divide() -> None:
    with pytest.raises(TensorError, match=r"q_proj\.weight' has 60 rows, which 4 heads do not divide"):
        plan(change={"model.layers.0.self_attn.q_proj.weight": (60, 64)})


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("shape", [(), (0, 64), (320, 0)], ids=str)
def test_a_tensor_without_dimensions_or_elements_has_no_place(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(TensorError, match=f"'{name}' in s has (no place|the shape)"):
        plan(change={name: shape})


def test_a_tensor_of_five_dimensions() -> None:
    with pytest.raises(TensorError, match=r"'lm_head\.weight' in s has the shape \[1, 1, 1, 320, 64\]"):
        plan(change={"lm_head.weight": (1, 1, 1, 320, 64)})


def test_a_dtype_that_is_not_converted() -> None:
    config = tiny_config()
    shapes = {name: array.shape for name, array in tiny_tensors(config).items()}
    family = family_of("LlamaForCausalLM")
    for name, ends_well in (("model.norm.weight", False), ("model.layers.0.self_attn.rotary_emb.inv_freq", True)):
        dtypes = dict.fromkeys(shapes, "BF16") | {name: "F64"}
        tensors = {
            name: stored(TensorInfo(name, dtype, shapes.get(name, (8,)), Path("s"), 0, 0))
            for name, dtype in dtypes.items()
        }
        if ends_well:
            assert plan_tensors(tensors, family, family.hparams(config))
        else:
            with pytest.raises(UnsupportedError, match=rf"'{name}' in s is F64; BF16, F16 and F32 are converted"):
                plan_tensors(tensors, family, family.hparams(config))


def test_a_bias_that_one_block_lost() -> None:
    with pytest.raises(TensorError, match=r"lacks a tensor of the model: blk\.1\.attn_k\.bias, which other blocks"):
        plan("Qwen2ForCausalLM", change={"model.layers.1.self_attn.k_proj.bias": None})


def test_names_reach_no_terminal_as_they_are() -> None:
    with pytest.raises(TensorError) as raised:
        plan(change={"\x1b[2J\u202e" + "x" * 10_000: (1,)})
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 500


def test_a_dtype_that_is_hidden_behind_arithmetic_is_refused_where_it_is_read() -> None:
    weights = stored(TensorInfo("x", "I32", (2, 4), Path("s"), 0, 32)).mapped(lambda values: values + 1)
    with pytest.raises(UnsupportedError, match="'x' in s is I32"):
        weights.values()
