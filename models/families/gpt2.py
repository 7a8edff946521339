"""GPT-2, GPT-NeoX (Pythia), GPT-BigCode (StarCoder), BLOOM, MPT and Falcon."""

import numpy as np

from models.config_fields import is_inert, is_neutral
from models.errors import CheckpointError
from models.families import ModelFamily
from models.families.keys import NO_SCALING, absent, fixed, flag, other_theta, rotary_dim
from models.families.passes import change, own_output, rename, transposed
from models.hparams import Hparams
from models.rope import number_of, shown
from models.weights import Weights

_PLAIN_HEADS = {"attention.key_length": absent, "attention.value_length": absent}
_NO_ROPE = {**NO_SCALING, **_PLAIN_HEADS, "rope.freq_base": absent, "rope.dimension_sections": absent}


def _four_times(hparams: Hparams) -> int:
    return 4 * hparams.integer("hidden_size")


_FOUR_TIMES = {"intermediate_size": lambda hparams: (None, _four_times(hparams))}
_ATTENTION = {
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
}

# transformers, GPT2Config
GPT2 = ModelFamily(
    architectures=("GPT2LMHeadModel",),
    gguf_arch="gpt2",
    defaults={
        "max_position_embeddings": 1024,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu_new",
        "tie_word_embeddings": True,
        "rope_theta": 1,
    },
    requires={**_FOUR_TIMES, **_ATTENTION, "hidden_act": ("gelu_new", "gelu_pytorch_tanh")},
    keys={**_NO_ROPE, "feed_forward_length": _four_times, "attention.head_count_kv": absent},
    passes=(
        transposed(r".*\.(c_attn|c_proj|c_fc)\.weight"),
        rename(r"(h\.\d+\..*|wte.*|wpe.*|ln_f.*)", r"transformer.\1"),
    ),
    ignored=("reorder_and_upcast_attn", "output_past", "n_special", "predict_special_tokens"),
    # the first: the order and precision of the same arithmetic
)


def _by_kind(weights: Weights, hparams: Hparams) -> Weights:
    """Query, key and value of one head after the other: all queries, all keys, all values instead."""
    heads = weights.grid.reshape(hparams.n_heads, 3, -1)
    return weights.pick(heads.swapaxes(0, 1).reshape(-1))


def _starcoder_heads_kv(hparams: Hparams) -> int:
    return 1 if hparams.flag("multi_query") else hparams.n_heads


def _starcoder_attention(weights: Weights, hparams: Hparams) -> Weights:
    """Queries, then the one key and value of all heads; where each head has its own, head after head."""
    return weights if hparams.flag("multi_query") else _by_kind(weights, hparams)


# transformers, GPTBigCodeConfig; the activation is StarCoder's
GPT_BIGCODE = ModelFamily(
    architectures=("GPTBigCodeForCausalLM",),
    gguf_arch="starcoder",
    defaults={**GPT2.defaults, "hidden_act": "gelu_pytorch_tanh", "multi_query": True},
    requires={
        **_FOUR_TIMES,
        "scale_attn_weights": (None, True),
        "hidden_act": ("gelu_pytorch_tanh", "gelu_new", "gelu"),
    },
    keys={**_NO_ROPE, "feed_forward_length": _four_times, "attention.head_count_kv": _starcoder_heads_kv},
    passes=(change(r".*\.c_attn\.(weight|bias)", _starcoder_attention),),
    ignored=(
        "attention_softmax_in_fp32",
        "scale_attention_softmax_in_fp32",
        "inference_runner",
        "max_batch_size",
        "num_key_value_heads",
        "max_sequence_length",
        "pad_key_length",
        "pre_allocate_kv_cache",
        "validate_runner_input",
    ),
)

# transformers, GPTNeoXConfig
GPT_NEOX = ModelFamily(
    architectures=("GPTNeoXForCausalLM",),
    gguf_arch="gptneox",
    defaults={
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "hidden_act": "gelu",
        "use_parallel_residual": True,
    },
    requires={
        "hidden_act": ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh"),
        "attention_bias": (None, True),
    },
    keys={
        **_PLAIN_HEADS,
        "attention.head_count_kv": absent,
        "rope.dimension_count": rotary_dim,
        "rope.freq_base": other_theta(10000.0),
        "use_parallel_residual": flag("use_parallel_residual"),
    },
    passes=(
        change(r".*\.query_key_value\.(weight|bias)", _by_kind),
        own_output("gpt_neox.embed_in.weight", "embed_out.weight"),
    ),
)

# transformers, BloomConfig
BLOOM = ModelFamily(
    architectures=("BloomForCausalLM", "BloomModel"),
    gguf_arch="bloom",
    defaults={"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 1},
    requires={**_FOUR_TIMES, "apply_residual_connection_post_layernorm": (None, False)},
    keys={**_NO_ROPE, "feed_forward_length": _four_times},
    passes=(rename(r"transformer\.(.*)", r"\1"), change(r".*\.query_key_value\.(weight|bias)", _by_kind)),
    ignored=(
        "slow_but_exact",
        "offset_alibi",
        "skip_bias_add",
        "skip_bias_add_qkv",
        "unk_token_id",
        "attention_softmax_in_fp32",
        "masked_softmax_fusion",
        "bias_dropout_fusion",
    ),
)


def _by_group(weights: Weights, hparams: Hparams) -> Weights:
    """Each group of queries with its key and its value: all queries, all keys, all values instead."""
    n_groups = _falcon_heads_kv(hparams)
    groups = weights.grid.reshape(n_groups, hparams.n_heads // n_groups + 2, -1)
    parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
    return weights.pick(np.concatenate([part.reshape(-1) for part in parts]))


def _falcon_heads_kv(hparams: Hparams) -> int:
    """The first configs of the 40B model tell it by having `n_head_kv` at all."""
    usual = 1 if hparams.flag("multi_query") else hparams.n_heads
    grouped = hparams.flag("new_decoder_architecture") or hparams.has("n_head_kv")
    return hparams.n_heads_kv if grouped else usual


# transformers, FalconConfig
FALCON = ModelFamily(
    architectures=("FalconForCausalLM", "RWForCausalLM"),
    gguf_arch="falcon",
    defaults={
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "multi_query": True,
        "parallel_attn": True,
    },
    requires={
        **_FOUR_TIMES,
        "alibi": (None, False),
        "parallel_attn": (True,),
        "activation": (None, "gelu"),
        "ff_factor": (None, 4),
    },
    keys={
        **_PLAIN_HEADS,
        "tensor_data_layout": fixed("jploski"),
        "feed_forward_length": _four_times,
        "attention.head_count_kv": _falcon_heads_kv,
        "rope.freq_base": other_theta(10000.0),
    },
    passes=(change(r".*\.query_key_value\.weight", _by_group),),
    # whether there are one or two norms, the tensors tell
    ignored=("apply_residual_connection_post_layernorm", "num_kv_heads", "num_ln_in_parallel_attn"),
)


def _attention(hparams: Hparams, name: str, default: object) -> object:
    """A field of the config within the config."""
    settings = hparams.get("attn_config")
    value = settings.get(name) if isinstance(settings, dict) else None
    return default if value is None else value


# What the attention of every MPT has; which implementation computes it, and how a rope would be that it lacks
_ATTENTION_FIELDS = ("attn_type", "kv_n_heads", "alibi", "alibi_bias_max", "clip_qkv", "fused_qkv")
_ATTENTION_INERT = ("attn_impl", "rope_theta", "rope_impl", "rope_dail_config", "rope_hf_config")
_ATTENTION_TYPES = ("multihead_attention", "multiquery_attention", "grouped_query_attention")


def _plain_attention(hparams: Hparams) -> tuple[object, ...]:
    settings = hparams.get("attn_config")
    others = {
        name: value
        for name, value in (settings if isinstance(settings, dict) else {}).items()
        if name not in (*_ATTENTION_FIELDS, *_ATTENTION_INERT) and not is_inert(name)
    }
    if others.get("sliding_window_size") == -1:
        del others["sliding_window_size"]
    plain = all(is_neutral(name, value) for name, value in others.items())
    return (settings,) if plain and _attention(hparams, "attn_type", _ATTENTION_TYPES[0]) in _ATTENTION_TYPES else ()


def _mpt_heads_kv(hparams: Hparams) -> int | None:
    usual = 1 if _attention(hparams, "attn_type", "") == "multiquery_attention" else None
    given = _attention(hparams, "kv_n_heads", usual)
    if given is not None and (type(given) is not int or not 1 <= given <= hparams.n_heads):
        raise CheckpointError(f"config.json: 'attn_config.kv_n_heads' is {shown(given)}, out of range")
    return given


def _alibi(hparams: Hparams) -> float:
    if not _attention(hparams, "alibi", True):
        return 0.0
    return number_of("attn_config.alibi_bias_max", _attention(hparams, "alibi_bias_max", 8))


def _clip(hparams: Hparams) -> float | None:
    clip = _attention(hparams, "clip_qkv", None)
    return None if clip is None else number_of("attn_config.clip_qkv", clip)


# transformers, MptConfig
MPT = ModelFamily(
    architectures=("MptForCausalLM", "MPTForCausalLM"),
    gguf_arch="mpt",
    defaults={
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_theta": 1,
    },
    requires={
        "attn_config": _plain_attention,
        "logit_scale": (None,),
        "norm_type": (None, "low_precision_layernorm", "layernorm"),
    },
    keys={
        **_NO_ROPE,
        "feed_forward_length": _four_times,
        "attention.head_count_kv": _mpt_heads_kv,
        "attention.clamp_kqv": _clip,
        "attention.max_alibi_bias": _alibi,
    },
    ignored=(
        "expansion_ratio",
        "learned_pos_emb",
        "emb_init_std",
        "verbose",
        "embedding_fraction",
        "init_config",
        "init_device",
        "tokenizer_name",
        "fc_type",
    ),
)
