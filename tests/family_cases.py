"""All cases, and where llama.cpp's converter and this one part."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from types import MappingProxyType

from tests import (
    family_cases_dense,
    family_cases_experts,
    family_cases_gemma,
    family_cases_hub,
    family_cases_multimodal,
    family_cases_older,
    family_cases_recurrent,
    family_cases_remote,
    family_cases_renamed,
    family_cases_variants,
)
from tests.family_checkpoints import Case, Refusal

__all__ = ["CASES", "DIFFERENCES", "PEER_FAILS", "REFUSED"]

_MODULES = (
    family_cases_dense,
    family_cases_experts,
    family_cases_gemma,
    family_cases_recurrent,
    family_cases_older,
    family_cases_multimodal,
    family_cases_remote,
    family_cases_renamed,
    family_cases_hub,
    family_cases_variants,
)

CASES: Mapping[str, Case] = MappingProxyType(dict(chain.from_iterable(module.CASES.items() for module in _MODULES)))
if len(CASES) != sum(len(module.CASES) for module in _MODULES):
    raise ValueError("two cases have one name")

REFUSED: Mapping[str, Refusal] = MappingProxyType(
    {
        **family_cases_dense.REFUSED,
        **family_cases_experts.REFUSED,
        **family_cases_hub.REFUSED,
        **family_cases_variants.REFUSED,
    }
)

_NO_EXTRA_BLOCK = "theirs counts a block that predicts a further token, which transformers does not save"
_EXP = "the exponential is rounded from float64, theirs is off by the last bit"
_CONTEXT = "theirs is the width of the model, or a constant"

DIFFERENCES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "bloom": {"bloom.context_length": _CONTEXT},
        "gemma": {"tokenizer.ggml.eot_token_id": "token 107 ends a turn in a vocabulary of 256,000 tokens"},
        "mpt": {"general.file_type": "theirs has none"},
        "mpt-hub": {"general.file_type": "theirs has none"},
        "mpt-positions": {"general.file_type": "theirs has none"},
        "nemotron-h-moe": {
            f"blk.2.attn_{part}.weight": "theirs reorders the rows for a rope that the model does not have"
            for part in "qk"
        },
        "xverse": {
            "xverse.attention.head_count_kv": "theirs has none, which means the same",
            **dict.fromkeys(
                ("tokenizer.ggml.merges", "tokenizer.ggml.model", "tokenizer.ggml.pre"),
                "theirs takes every tokenizer.json of an XVERSE for one with byte fallback",
            ),
        },
        "falcon-40b": {"falcon.context_length": _CONTEXT},
        "falcon-40b-oldest": {"falcon.context_length": _CONTEXT},
        "falcon2-11b": {
            "falcon.context_length": _CONTEXT,
            "falcon.rope.freq_base": "theirs leaves it out, and llama.cpp takes 10,000",
        },
        "glm": {
            "chatglm.context_length": _CONTEXT,
            "chatglm.attention.layer_norm_rms_epsilon": "theirs reads it under ChatGLM's name, and writes the default",
        },
        "glm4-moe": dict.fromkeys(("glm4moe.block_count", "glm4moe.nextn_predict_layers"), _NO_EXTRA_BLOCK),
        "glm4-moe-qk-norm": dict.fromkeys(("glm4moe.block_count", "glm4moe.nextn_predict_layers"), _NO_EXTRA_BLOCK),
    }
)
"""Case -> key or tensor that differs from llama.cpp's converter -> why."""

_FROM_AUTO_CONFIG = "it takes the config from transformers 5, which has no such field"

PEER_FAILS: Mapping[str, str] = MappingProxyType(
    {
        "baichuan": "it calls itself until the stack is full",
        "baichuan-7b-hub": "it calls itself until the stack is full",
        "baichuan-13b": "it calls itself until the stack is full",
        "chatglm3": "wants a vocab_size beside padded_vocab_size",
        "qwen1": "wants Qwen's own tokenizer",
        "cohere2-transformers-5": f"no rotary_pct: {_FROM_AUTO_CONFIG}",
        "deepseek3-transformers-5": "no scoring_func: softmax instead of sigmoid",
        "exaone3": "wants activation_function, and takes the config from transformers, which calls it otherwise",
        "olmo-first": "knows the names that transformers gives alone",
        "falcon-7b": "transformers counts as many key heads as queries, and the rows do not divide so",
        "falcon-7b-hub": "takes as many key heads as queries from the config, which the rows are not divided into",
        "falcon-h1-transformers-5": "no head_dim",
        "gemma3n-transformers-5": "llama.cpp wants keys and values of layers that share those of others",
        "glm4-moe-lite-transformers-5": "no first_k_dense_replace and no scoring_func",
        "gpt-neox": f"no rotary_pct: {_FROM_AUTO_CONFIG}",
        "gpt-neox-serial": f"no rotary_pct: {_FROM_AUTO_CONFIG}",
        "gpt-neox-transformers-4": f"no rotary_pct: {_FROM_AUTO_CONFIG}",
        "gpt-neox-tied": f"no rotary_pct: {_FROM_AUTO_CONFIG}",
        "gpt-neox-hub": f"no rotary_pct: {_FROM_AUTO_CONFIG}",
        "gpt-bigcode-heads": "takes every one for multi-query attention",
        "gpt2-hub": "finds no place for the causal masks that old checkpoints have beside the weights",
        "gpt2-transformers-5": "no n_ctx",
        "granite-hybrid-transformers-5": "layer types by their newer names are all taken for Mamba",
        "hunyuan-moe": "looks for the ranks of a tiktoken tokenizer",
        "hunyuan-moe-hub": "wants heads of 128 rows, and the ranks of a tiktoken tokenizer",
        "minicpm-stretched": "does not say how long the context was before its rope was scaled",
        "minicpm3-stretched": "does not say how long the context was before its rope was scaled",
        "mpt-groups": f"wants queries with a key each: {_FROM_AUTO_CONFIG}",
        "mpt-multi-query": "as many key heads as queries",
        "mpt-transformers": "knows the architecture by the name of the code beside the checkpoints alone",
        "nemotron-h": f"a dense model is taken for a mixture: {_FROM_AUTO_CONFIG}",
        "nemotron-h-hub": f"a dense model is taken for a mixture: {_FROM_AUTO_CONFIG}",
        "nemotron-h-transformers-5": f"a dense model is taken for a mixture: {_FROM_AUTO_CONFIG}",
        "smolvlm": "knows the part that reads text by the architectures of text_config alone",
        "idefics3": "knows the part that reads text by the architectures of text_config alone",
        "stablelm-12b": "the norms of the heads are stacked and dropped",
    }
)
"""Case -> why llama.cpp's converter stops, or writes what llama.cpp cannot load or computes otherwise."""
