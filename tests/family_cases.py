"""All cases, and where llama.cpp's converter and this one part."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from types import MappingProxyType

from tests import (
    family_cases_dense,
    family_cases_experts,
    family_cases_gemma,
    family_cases_multimodal,
    family_cases_older,
    family_cases_recurrent,
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
)

CASES: Mapping[str, Case] = MappingProxyType(dict(chain.from_iterable(module.CASES.items() for module in _MODULES)))
if len(CASES) != sum(len(module.CASES) for module in _MODULES):
    raise ValueError("two cases have one name")

REFUSED: Mapping[str, Refusal] = MappingProxyType({**family_cases_dense.REFUSED, **family_cases_experts.REFUSED})

DIFFERENCES: Mapping[str, Mapping[str, str]] = MappingProxyType({})
"""Case -> key or tensor that differs from llama.cpp's converter -> why."""

_FROM_AUTO_CONFIG = "it takes the config from transformers 5, which has no such field"

PEER_FAILS: Mapping[str, str] = MappingProxyType(
    {
        "cohere2-transformers-5": f"no rotary_pct: {_FROM_AUTO_CONFIG}",
        "deepseek3-transformers-5": "no scoring_func: softmax instead of sigmoid",
        "falcon-7b": "transformers counts as many key heads as queries, and the rows do not divide so",
        "falcon-h1-transformers-5": "no head_dim",
        "gemma3n-transformers-5": "llama.cpp wants keys and values of layers that share those of others",
        "glm4-moe-lite-transformers-5": "no first_k_dense_replace and no scoring_func",
        "gpt-neox": f"no rotary_pct: {_FROM_AUTO_CONFIG}",
        "gpt-neox-serial": f"no rotary_pct: {_FROM_AUTO_CONFIG}",
        "gpt-neox-transformers-4": f"no rotary_pct: {_FROM_AUTO_CONFIG}",
        "gpt2-transformers-5": "no n_ctx",
        "granite-hybrid-transformers-5": "layer types by their newer names are all taken for Mamba",
        "hunyuan-moe": "looks for the ranks of a tiktoken tokenizer",
        "nemotron-h": f"a dense model is taken for a mixture: {_FROM_AUTO_CONFIG}",
        "nemotron-h-transformers-5": f"a dense model is taken for a mixture: {_FROM_AUTO_CONFIG}",
        "stablelm-12b": "the norms of the heads are stacked and dropped",
    }
)
"""Case -> why llama.cpp's converter stops, or writes what llama.cpp cannot load or computes otherwise."""
