"""Cases of the later Gemmas: per-layer embeddings, shared caches, global heads of their own size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tests.family_cases_dense import sliding
from tests.family_checkpoints import Case

# llama.cpp has the numbers of E2B and E4B in its code: 20 layers with a cache of their own, the first ten of them
# sparse, 64 as the rank of LAUREL, 256 values of each layer's own embedding.
GEMMA3N = {
    "num_hidden_layers": 25,
    "sliding_window": 24,
    "layer_types": sliding(1, 1, 1, 1, 0) * 5,
    "num_kv_shared_layers": 5,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 384,
    "laurel_rank": 64,
    "intermediate_size": 4096,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 15,
}
GEMMA4 = {
    "num_hidden_layers": 6,
    "sliding_window": 24,
    "layer_types": sliding(1, 1, 0, 1, 1, 0),
    "global_head_dim": 64,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
}


def softer(model: Any) -> None:
    """Queries and keys are multiplied unscaled: with norms near one, rounding alone changes what attention sees."""
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter *= 0.4


def unused_keys_and_values(tensors: dict[str, Any]) -> dict[str, Any]:
    """What Google's checkpoints hold for the layers that share a cache, and transformers no longer writes."""
    own = [(name, tensor) for name, tensor in tensors.items() if re.search(r"layers\.0\.self_attn\.[kv]_", name)]
    return {name.replace("layers.0.", f"layers.{i}."): tensor.clone() for i in range(20, 25) for name, tensor in own}


CASES: Mapping[str, Case] = {
    "gemma3n": Case("Gemma3nForCausalLM", GEMMA3N, tokenizer="gemma", adjust=softer, beside=unused_keys_and_values),
    "gemma3n-transformers-5": Case("Gemma3nForCausalLM", GEMMA3N, tokenizer="gemma", adjust=softer),
    "gemma4": Case(
        "Gemma4ForCausalLM",
        GEMMA4,
        tokenizer="gemma4",
        adjust=softer,
    ),
    "gemma4-effective": Case(
        "Gemma4ForCausalLM",
        {
            **GEMMA4,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 316,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
        },
        tokenizer="gemma4",
        adjust=softer,
    ),
    "gemma4-key-is-value": Case(
        "Gemma4ForCausalLM",
        {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        tokenizer="gemma4",
        adjust=softer,
    ),
    "gemma4-moe": Case(
        "Gemma4ForCausalLM",
        {**GEMMA4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
        tokenizer="gemma4",
        seed=3,
        adjust=softer,
    ),
}
