"""Qwen3-Next and Qwen 3.5: gated delta nets and attention, dense and mixtures of experts."""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from re import Match

import numpy as np

from models.families import Pass
from models.families.keys import integer, natural, rotary_dim
from models.families.passes import change, each, flat, negative_exponential, plus, rename
from models.families.qwen import QWEN2_MOE
from models.hparams import Hparams
from models.weights import Index, Weights

_DEFAULTS = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
}

# Heads that predict the token after the next, as blocks after the last
_MTP_NAMES = {
    "fc": "eh_proj",
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "norm": "shared_head_norm",
}
_MTP = re.compile(rf"(?:model\.)?mtp\.(?:layers\.(?P<layer>\d{{1,6}})|(?P<part>{'|'.join(_MTP_NAMES)}))\.(?P<rest>.+)")


def _n_extra(hparams: Hparams) -> int:
    layers = [int(match["layer"]) for name in hparams.tensors if (match := _MTP.fullmatch(name)) and match["layer"]]
    return max(layers, default=-1) + 1


def _as_block(weights: Weights, hparams: Hparams, match: Match[str]) -> Iterable[tuple[str, Weights]]:
    if match["layer"]:
        yield f"model.layers.{hparams.n_layers + int(match['layer'])}.{match['rest']}", weights
    else:
        yield f"blk.{hparams.n_layers}.nextn.{_MTP_NAMES[match['part']]}.{match['rest']}", weights


def _by_key_head(weights: Weights, hparams: Hparams, match: Match[str]) -> Iterable[tuple[str, Weights]]:
    """Queries, keys, values and gates of one key head after the other: all of one kind together instead."""
    heads, key_dim, value_dim, per_key = _heads(hparams)
    ends = np.cumsum([key_dim, key_dim, per_key * value_dim, per_key * value_dim])
    grid = weights.grid.reshape(heads, int(ends[-1]))
    parts = [part.reshape(-1) for part in np.split(grid, ends[:-1], axis=1)]
    yield f"blk.{match[1]}.attn_qkv.weight", weights.pick(np.concatenate(parts[:3]))
    yield f"blk.{match[1]}.attn_gate.weight", weights.pick(parts[3])


def _heads(hparams: Hparams) -> tuple[int, int, int, int]:
    """Key heads, rows of a key head and of a value head, value heads for each key head."""
    keys, values = hparams.integer("linear_num_key_heads"), hparams.integer("linear_num_value_heads")
    return keys, hparams.integer("linear_key_head_dim"), hparams.integer("linear_value_head_dim"), values // keys


def _tiled(order: Index, hparams: Hparams, rows: int) -> Index:
    """Value heads from grouped by key head to the first of each, the second of each: ggml repeats keys so."""
    keys, _, _, per_key = _heads(hparams)
    return order.reshape(keys, per_key, rows).swapaxes(0, 1).reshape(-1)


def _tiled_values(rows: int | None = None, *, after_keys: bool = False) -> Callable[[Weights, Hparams], Weights]:
    def function(weights: Weights, hparams: Hparams) -> Weights:
        keys, key_dim, value_dim, _ = _heads(hparams)
        n_before = 2 * keys * key_dim if after_keys else 0
        grid = np.arange(weights.n_rows)
        values = _tiled(grid[n_before:], hparams, rows or value_dim)
        return weights.pick(np.concatenate([grid[:n_before], values]))

    return function


def _tiled_columns(weights: Weights, hparams: Hparams) -> Weights:
    return weights.pick_columns(_tiled(np.arange(weights.row_length), hparams, _heads(hparams)[2]))


_DELTA_NET: tuple[Pass, ...] = (
    each(_MTP.pattern, _as_block),
    plus(r"(?!.*linear_attn\.norm\.weight).*norm\.weight", 1),
    change(r".*\.conv1d\.weight", flat),
    change(r".*\.A_log", negative_exponential),
    rename(r"(.*)\.dt_bias", r"\1.dt_proj.bias"),
    each(r".*layers\.(\d+)\.linear_attn\.in_proj_qkvz\.weight", _by_key_head),
)


def _recurrent(hparams: Hparams) -> list[bool] | None:
    if not hparams.has("layer_types"):
        return None
    kinds = hparams.items("layer_types")
    return [kind == "linear_attention" for kind in kinds] + [False] * _n_extra(hparams)


# transformers, Qwen3NextConfig
QWEN3_NEXT = replace(
    QWEN2_MOE,
    architectures=("Qwen3NextForCausalLM",),
    gguf_arch="qwen3next",
    defaults={
        **_DEFAULTS,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts_per_tok": 10,
        "num_experts": 512,
        "norm_topk_prob": True,
    },
    requires={
        "norm_topk_prob": (True,),
        "attention_bias": (None, False),
        "decoder_sparse_step": (None, 1),
        "mlp_only_layers": (None, []),
    },
    keys={
        **QWEN2_MOE.keys,
        "ssm.conv_kernel": integer("linear_conv_kernel_dim"),
        "ssm.state_size": integer("linear_key_head_dim"),
        "ssm.group_count": integer("linear_num_key_heads"),
        "ssm.time_step_rank": integer("linear_num_value_heads"),
        "ssm.inner_size": lambda hparams: (
            hparams.integer("linear_value_head_dim") * hparams.integer("linear_num_value_heads")
        ),
        "attention.recurrent_layers": _recurrent,
        "full_attention_interval": natural("full_attention_interval"),
        "rope.dimension_count": rotary_dim,
        "nextn_predict_layers": lambda hparams: _n_extra(hparams) or None,
    },
    passes=_DELTA_NET,
    ignored=("mtp_num_hidden_layers",),
    n_blocks=lambda hparams: hparams.n_layers + _n_extra(hparams),
)

# transformers, Qwen3_5Config, Qwen3_5TextConfig; llama.cpp wants the sections also where the text model has none
QWEN3_5 = replace(
    QWEN3_NEXT,
    architectures=("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
    gguf_arch="qwen35",
    defaults=_DEFAULTS,
    requires={"attention_bias": (None, False)},
    keys={
        **{key: getter for key, getter in QWEN3_NEXT.keys.items() if not key.startswith("expert_")},
        "rope.dimension_sections": lambda hparams: (
            [*sections, 0, 0, 0, 0][:4]
            if isinstance(sections := hparams.rope.fields.get("mrope_section"), list)
            else [11, 11, 10, 0]
        ),
    },
    passes=(
        change(r".*\.linear_attn\.in_proj_qkv\.weight", _tiled_values(after_keys=True)),
        change(r".*\.linear_attn\.in_proj_z\.weight", _tiled_values()),
        change(r".*\.linear_attn\.(in_proj_[ab]\.weight|A_log|dt_bias)", _tiled_values(1)),
        change(r".*\.linear_attn\.out_proj\.weight", _tiled_columns),
        *_DELTA_NET,
        change(r".*\.conv1d\.weight", _tiled_values(after_keys=True)),
    ),
    ignored=("mtp_num_hidden_layers", "attn_output_gate", "mamba_ssm_dtype", "mtp_use_dedicated_embeddings"),
)

# transformers, Qwen3_5MoeConfig, Qwen3_5MoeTextConfig
QWEN3_5_MOE = replace(
    QWEN3_5,
    architectures=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
    gguf_arch="qwen35moe",
    defaults={
        **_DEFAULTS,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts_per_tok": 8,
        "num_experts": 256,
    },
    requires={"attention_bias": (None, False), "norm_topk_prob": (None, True)},
    keys={**QWEN3_5.keys, **QWEN2_MOE.keys},
)
