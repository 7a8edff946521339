"""config.json in the spellings of transformers 4 and 5, and what in it is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import CheckpointError, UnsupportedError
from models.families import keys
from models.families.keys import COMMON
from models.hparams import Hparams
from tests.checkpoints import message_of, quick, tiny_config

DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}


def hparams(**fields: Any) -> Hparams:
    return Hparams(tiny_config(**fields), DEFAULTS)


def shown(value: object) -> str:
    return repr(value)[:9]


def test_reads_fields_and_defaults() -> None:
    config = tiny_config()
    del config["rms_norm_eps"], config["rope_parameters"]
    fields = Hparams(config, DEFAULTS)
    assert (fields.n_layers, fields.n_heads, fields.n_heads_kv, fields.head_dim) == (2, 4, 2, 16)
    assert fields.number("rms_norm_eps") == 1e-6
    assert (fields.rope.type, fields.rope.theta) == ("default", 10000.0)


def test_null_is_no_value() -> None:
    assert hparams(rms_norm_eps=None).number("rms_norm_eps") == 1e-6
    assert hparams(num_key_value_heads=None).n_heads_kv == 4
    assert hparams(head_dim=None).head_dim == 16


def test_head_dim_need_not_follow_from_the_hidden_size() -> None:
    assert hparams(head_dim=48).head_dim == 48


def test_hidden_size_that_the_heads_do_not_divide() -> None:
    with pytest.raises(CheckpointError, match="hidden_size 64 is not a multiple of num_attention_heads 5"):
        _ = hparams(num_attention_heads=5).head_dim


def test_fields_of_the_text_model_come_before_the_outer_ones() -> None:
    fields = Hparams({"hidden_size": 1, "bos_token_id": 7, "text_config": {"hidden_size": 64}}, {})
    assert (fields.integer("hidden_size"), fields.integer("bos_token_id")) == (64, 7)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "has no 'hidden_size'"),
        ("64", "'hidden_size' is '64', not an integer"),
        (64.5, "not an integer"),
        (True, "not an integer"),
        ([64], "not an integer"),
        (float("nan"), "not an integer"),
        (float("inf"), "'hidden_size' is inf, "),
        (0, "out of range"),
        (-64, "out of range"),
        (2**31, "out of range"),
        (10**400, "out of range"),
    ],
    ids=shown,
)
def test_what_is_no_size(value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        hparams(hidden_size=value).integer("hidden_size")


def test_whole_floats_are_sizes() -> None:
    assert hparams(hidden_size=64.0).integer("hidden_size") == 64


@pytest.mark.parametrize("value", ["1e-5", True, [], float("nan")])
def test_what_is_no_number(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"'rms_norm_eps' is .*, not a number"):
        hparams(rms_norm_eps=value).number("rms_norm_eps")


@pytest.mark.parametrize("value", [float("inf"), -1e300, 10**400], ids=shown)
def test_numbers_that_a_file_does_not_hold(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"'rms_norm_eps' is .*, out of range"):
        hparams(rms_norm_eps=value).number("rms_norm_eps")


# Rope


LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
        {"rope_parameters": None, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": None, "rope_theta": 500000, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "LLAMA3", **LLAMA3}, "rope_theta": 500000.0},
    ],
    ids=["transformers-5", "transformers-4", "older-4", "mixed"],
)
def test_rope_in_every_spelling(fields: dict[str, Any]) -> None:
    rope = hparams(**fields).rope
    assert (rope.type, rope.theta) == ("llama3", 500000.0)
    assert {name: rope.number(name) for name in LLAMA3} == LLAMA3


def test_trained_context_may_stand_outside() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0}
    rope = hparams(rope_parameters=scaling, original_max_position_embeddings=4096).rope
    assert rope.number("original_max_position_embeddings") == 4096


@pytest.mark.parametrize("name", ["ntk", "xpos", "\x1b[2J" + "x" * 500])
def test_unknown_rope_scaling_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"rope scaling .* is not supported") as raised:
        _ = hparams(rope_parameters={"rope_type": name}).rope
    assert repr(name[:5].lower())[1:-1] in str(raised.value)
    assert str(raised.value).isprintable()
    assert "llama3" in raised.value.hint


@pytest.mark.parametrize("value", ["linear", [1], 7])
def test_rope_parameters_that_are_no_object(value: object) -> None:
    with pytest.raises(CheckpointError, match="the rope parameters are"):
        _ = hparams(rope_parameters=value).rope


def test_a_field_that_the_scaling_needs() -> None:
    rope = hparams(rope_parameters={"rope_type": "linear"}).rope
    with pytest.raises(CheckpointError, match=r"'rope_parameters\.factor' is missing"):
        rope.number("factor")
    assert rope.number("factor", 2.0) == 2.0


# Computations that llama.cpp's graphs of these families do not have


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "gelu"},
        {"final_logit_softcapping": 30.0},
        {"embedding_multiplier": 12},
        {"logits_scaling": 8},
        {"num_local_experts": 8},
        {"partial_rotary_factor": 0.5},
        {"no_rope_layers": [1, 0]},
        {"norm_topk_prob": False},
        {"an_option_of_tomorrow": 3},
        {"use_qk_norm": True},
        {"hidden_act": True},
        {"logit_scale": True},
    ],
    ids=str,
)
def test_unknown_computation_is_refused_by_field(fields: dict[str, object]) -> None:
    with pytest.raises(UnsupportedError, match=f"'{next(iter(fields))}' is "):
        read(hparams(**fields)).refuse_unread()


def read(fields: Hparams) -> Hparams:
    """With all read that every family reads."""
    for name in tiny_config():
        if name != "hidden_act":
            fields.get(name)
    return fields


def test_neutral_values_pass() -> None:
    neutral = {"logit_scale": 1.0, "num_local_experts": 0, "use_sliding_window": False, "layer_types": None}
    read(hparams(**neutral)).refuse_unread()
    read(hparams(layer_types=["full_attention"] * 2, partial_rotary_factor=1)).refuse_unread()


def test_what_has_nothing_to_do_with_the_computation_passes() -> None:
    read(hparams(image_token_id=7, attention_dropout=0.1, initializer_range=0.02, _name_or_path="x")).refuse_unread()


def test_a_field_that_is_read_in_another_spelling_passes() -> None:
    fields = hparams(n_embd=64)
    fields.get("hidden_size")
    read(fields).refuse_unread()


def test_a_head_that_is_as_wide_as_it_would_be_anyway_passes() -> None:
    read(hparams(head_dim=16)).refuse_unread()
    with pytest.raises(UnsupportedError, match="'head_dim' is 32"):
        read(hparams(head_dim=32)).refuse_unread()


def test_a_field_may_be_ignored_by_name() -> None:
    read(hparams(an_option_of_tomorrow=3)).refuse_unread(["an_option_of_tomorrow"])


def test_other_layers_than_full_attention_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="'layer_types'"):
        read(hparams(layer_types=["full_attention", "sliding_attention"])).refuse_unread()


def test_values_that_a_family_requires() -> None:
    hparams(use_sliding_window=False).require({"use_sliding_window": (None, False)})
    with pytest.raises(UnsupportedError, match="'use_sliding_window' is True"):
        hparams(use_sliding_window=True).require({"use_sliding_window": (None, False)})


# Any value in any field

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    *tiny_config(),
    "head_dim",
    "rope_scaling",
    "rope_theta",
    "layer_types",
    "quantization_config",
    "text_config",
)


@quick
@given(name=st.sampled_from(FIELDS), value=json_values)
def test_any_value_gives_a_named_error_at_most(name: str, value: object) -> None:
    fields = hparams(**{name: value})

    def everything() -> None:
        for getter in (*COMMON.values(), keys.rotary_dim, keys.layer_types("x")):
            getter(fields)
        fields.refuse_unread()

    assert message_of(everything).isprintable()


def test_a_partial_rotary_factor_that_nobody_reads_is_refused_wherever_it_stands() -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    fields = read(hparams(rope_parameters=rope))
    with pytest.raises(UnsupportedError, match="partial_rotary_factor"):
        fields.refuse_unread()
    assert fields.rotary_dim == 8
    fields.refuse_unread()
