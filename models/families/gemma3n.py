"""Gemma 3n and 4, the text part."""

from collections.abc import Mapping
from dataclasses import replace
from statistics import NormalDist

import numpy as np

from models.families import ModelFamily, Tensors, Value
from models.families import vocabulary as rules
from models.families.gemma import GEMMA3
from models.families.keys import integer, natural, number, sliding_pattern, sliding_theta
from models.families.passes import change, drop, each, rename, stack
from models.hparams import Hparams
from models.weights import Weights, concatenated, constant, zeros


def _sparsity(hparams: Hparams) -> list[float]:
    """How many deviations above the mean an activation must be, from the share that is cut."""
    shares = hparams.numbers("activation_sparsity_pattern")
    return [NormalDist().inv_cdf(share) if 0 < share < 1 else float("-inf") for share in shares]


def _padded(weights: Weights, hparams: Hparams) -> Weights:
    """A row for each token, of zeros for the pictures and sounds that have an embedding of their own."""
    missing = hparams.integer("vocab_size") - weights.shape[0]
    if missing <= 0:
        return weights
    return concatenated([weights, zeros(weights.name, (missing, *weights.shape[1:]))])


def _unused_caches(tensors: Tensors, hparams: Hparams) -> Tensors:
    """Blocks that share the cache of another have no use for keys and values; llama.cpp asks for them all the same."""
    result = dict(tensors)
    first = hparams.n_layers - hparams.natural("num_kv_shared_layers")
    width = hparams.n_heads_kv * hparams.head_dim
    hidden = hparams.integer("hidden_size")
    shapes = {"k_proj": (width, hidden), "v_proj": (width, hidden), "k_norm": (hparams.head_dim,)}
    for block in range(first, hparams.n_layers):
        for part, shape in shapes.items():
            name = f"model.layers.{block}.self_attn.{part}.weight"
            result.setdefault(name, zeros(name, shape))
    return result


# transformers, Gemma3nConfig, Gemma3nTextConfig; llama.cpp has the sizes of E2B and E4B in its code
GEMMA3N = replace(
    GEMMA3,
    architectures=("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"),
    gguf_arch="gemma3n",
    defaults={
        **GEMMA3.defaults,
        "vocab_size": 262400,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 2,
        "sliding_window": 512,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 256,
        "altup_active_idx": 0,
        "altup_num_inputs": 4,
        "num_kv_shared_layers": 15,
        "laurel_rank": 64,
    },
    requires={
        "hidden_act": ("gelu_pytorch_tanh",),
        "altup_active_idx": (0,),
        "altup_num_inputs": (4,),
        "altup_correct_scale": (None, True),
        "altup_coef_clip": (None, 120.0),
        "laurel_rank": (64,),
        "hidden_size_per_layer_input": (256,),
        "num_kv_shared_layers": lambda hparams: (hparams.n_layers - 20,),
    },
    keys={
        **GEMMA3.keys,
        "attention.sliding_window_pattern": sliding_pattern(5, always=True),
        "altup.active_idx": natural("altup_active_idx"),
        "altup.num_inputs": integer("altup_num_inputs"),
        "embedding_length_per_layer_input": integer("hidden_size_per_layer_input"),
        "attention.shared_kv_layers": natural("num_kv_shared_layers"),
        "activation_sparsity_scale": _sparsity,
    },
    passes=(
        drop(r"lm_head\.weight"),
        rename(r"(.*_scale)", r"\1.weight"),
        change(r".*embed_tokens(_per_layer)?\.weight", _padded),
        stack(r"(.*altup_(?:unembed_)?projections)\.(?P<n>\d)\.weight", r"\1.weight"),
        _unused_caches,
    ),
    ignored=("vocab_size_per_layer_input", "altup_lr_multiplier", "query_pre_attn_scalar"),  # queries are not scaled
)


def _of_full_attention(hparams: Hparams, name: str, hub_name: str) -> int | None:
    """What blocks that see all have otherwise: by a field, or in a field with settings for each block."""
    if hparams.has(hub_name):
        return hparams.integer(hub_name)
    blocks = hparams.get("per_layer_config")
    for settings in blocks.values() if isinstance(blocks, Mapping) else ():
        if isinstance(settings, Mapping) and type(value := settings.get(name)) is int:
            return value
    return None


def _global_head_dim(hparams: Hparams) -> int:
    return _of_full_attention(hparams, "head_dim", "global_head_dim") or 512


def _slides(hparams: Hparams) -> list[bool]:
    return [kind == "sliding_attention" for kind in hparams.items("layer_types")]


def _heads_kv(hparams: Hparams) -> Value:
    of_full = _of_full_attention(hparams, "num_key_value_heads", "num_global_key_value_heads")
    if of_full is None:
        return hparams.n_heads_kv
    return [hparams.n_heads_kv if slides else of_full for slides in _slides(hparams)]


def _widths(hparams: Hparams) -> Value:
    width = hparams.integer("intermediate_size")
    if not hparams.flag("use_double_wide_mlp"):
        return width
    first_shared = hparams.n_layers - hparams.natural("num_kv_shared_layers")
    return [width if block < first_shared else 2 * width for block in range(hparams.n_layers)]


def _with_rope_factors(tensors: Tensors, hparams: Hparams) -> Tensors:
    """Frequencies of full attention, in proportion to a whole head: those of the part that stands still are cut off.

    Source: transformers, modeling_rope_utils.py `_compute_proportional_rope_parameters`.
    """
    half = _global_head_dim(hparams) // 2
    turning = int(half * hparams.rotary_part)
    factors = np.where(np.arange(half) < turning, 1.0, 1e30).astype(np.float32)
    return {**tensors, "rope_freqs.weight": constant("rope_freqs.weight", factors)}


# transformers, Gemma4Config, Gemma4TextConfig
GEMMA4 = ModelFamily(
    architectures=("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
    gguf_arch="gemma4",
    defaults={
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": 512,
        "num_kv_shared_layers": 0,
        "tie_word_embeddings": True,
    },
    requires={"hidden_act": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (None, False, "vision")},
    keys={
        "attention.head_count_kv": _heads_kv,
        "feed_forward_length": _widths,
        "attention.key_length": _global_head_dim,
        "attention.value_length": _global_head_dim,
        "attention.key_length_swa": integer("head_dim"),
        "attention.value_length_swa": integer("head_dim"),
        "rope.freq_base_swa": sliding_theta,
        "final_logit_softcapping": number("final_logit_softcapping"),
        "attention.sliding_window": integer("sliding_window"),
        "attention.shared_kv_layers": natural("num_kv_shared_layers"),
        "embedding_length_per_layer_input": lambda hparams: (
            hparams.natural("hidden_size_per_layer_input") if hparams.has("hidden_size_per_layer_input") else 0
        ),
        "attention.sliding_window_pattern": _slides,
        "expert_feed_forward_length": integer("moe_intermediate_size"),
        "rope.dimension_count": _global_head_dim,
        "rope.dimension_count_swa": integer("head_dim"),
    },
    passes=(
        drop(r"lm_head\.weight"),
        rename(r"(.*(?:per_dim_scale|layer_scalar))", r"\1.weight"),
        each(
            r".*layers\.(\d+)\.router\.scale",
            lambda weights, hparams, match: [(f"blk.{match[1]}.ffn_gate_inp.scale", weights)],
        ),
        each(
            r".*layers\.(\d+)\..*per_expert_scale",
            lambda weights, hparams, match: [(f"blk.{match[1]}.ffn_down_exps.scale", weights)],
        ),
        rename(r"(.*\.experts\.gate_up_proj)", r"\1.weight"),
        _with_rope_factors,
    ),
    ignored=("vocab_size_per_layer_input", "attention_k_eq_v", "enable_moe_block"),
    vocabulary=rules.GEMMA4,
)
