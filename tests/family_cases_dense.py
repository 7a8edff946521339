"""Cases of dense decoders: attention and a feed-forward network in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.family_checkpoints import Case, Refusal

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def longrope(n_pairs: int, *, factor: float = 4.0) -> dict[str, Any]:
    """Scaled beyond 64 tokens, which the text is and a short one is not."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * i for i in range(n_pairs)],
        "long_factor": [1.0 + 0.3 * i for i in range(n_pairs)],
        "original_max_position_embeddings": 64,
        "factor": factor,
    }


def partial(factor: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}


def sliding(*windows: int) -> list[str]:
    """Layer types: 1 where attention sees a window, 0 where it sees all."""
    return ["sliding_attention" if window else "full_attention" for window in windows]


CASES: Mapping[str, Case] = {
    "llama": Case("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-linear": Case("LlamaForCausalLM", {"rope_parameters": LINEAR}),
    "llama-dynamic": Case("LlamaForCausalLM", {"rope_parameters": DYNAMIC}),
    "llama-llama3": Case("LlamaForCausalLM", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "llama-yarn": Case("LlamaForCausalLM", {"rope_parameters": YARN}),
    "llama-biases": Case("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "arcee": Case("ArceeForCausalLM", {"rope_parameters": YARN}),
    "mistral": Case("MistralForCausalLM", {"sliding_window": None}, tokenizer="sentencepiece"),
    "ministral3": Case(
        "Ministral3ForCausalLM",
        {
            "rope_parameters": YARN
            | {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
        },
    ),
    "qwen2": Case("Qwen2ForCausalLM", {"tie_word_embeddings": True}, tokenizer="qwen"),
    "qwen2-dynamic": Case("Qwen2ForCausalLM", {"rope_parameters": DYNAMIC}, tokenizer="qwen"),
    "qwen3": Case("Qwen3ForCausalLM", {"tie_word_embeddings": True}, tokenizer="qwen"),
    "qwen3-yarn": Case("Qwen3ForCausalLM", {"rope_parameters": YARN}, tokenizer="qwen", dtype="float32"),
    "gemma": Case("GemmaForCausalLM", tokenizer="gemma"),
    "gemma2": Case(
        "Gemma2ForCausalLM",
        {"sliding_window": 24, "num_hidden_layers": 4, "query_pre_attn_scalar": 32},
        tokenizer="gemma",
    ),
    "gemma3": Case(
        "Gemma3ForCausalLM",
        {"sliding_window": 24, "num_hidden_layers": 7, "query_pre_attn_scalar": 32},
        tokenizer="gemma",
    ),
    "gemma3-linear": Case(
        "Gemma3ForCausalLM",
        {
            "sliding_window": 24,
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 32,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": partial(1.0)},
        },
        tokenizer="gemma",
    ),
    "smollm3": Case("SmolLM3ForCausalLM", {"num_hidden_layers": 5}),
    "phi2": Case(
        "PhiForCausalLM", {"rope_parameters": partial(0.5), "num_key_value_heads": 4, "intermediate_size": 256}
    ),
    "phi3": Case("Phi3ForCausalLM", {"sliding_window": 2047}, tokenizer="sentencepiece"),
    "phi3-longrope": Case(
        "Phi3ForCausalLM",
        {"rope_parameters": longrope(8), "original_max_position_embeddings": 64},
        tokenizer="sentencepiece",
    ),
    "phi4": Case("Phi3ForCausalLM", tokenizer="phi4"),
    "phi4-mini": Case(
        "Phi3ForCausalLM",
        {
            "rope_parameters": longrope(6) | {"partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
        tokenizer="phi4",
    ),
    "glm": Case("GlmForCausalLM", {"rope_parameters": partial(0.5), "head_dim": 16}, tokenizer="glm"),
    "glm4": Case("Glm4ForCausalLM", {"rope_parameters": partial(0.5)}, tokenizer="glm"),
    "olmo": Case("OlmoForCausalLM"),
    "olmo-clip": Case("OlmoForCausalLM", {"clip_qkv": 0.5}),
    "olmo2": Case("Olmo2ForCausalLM"),
    "olmo3": Case("Olmo3ForCausalLM", {"sliding_window": 24, "num_hidden_layers": 5}),
    "olmo3-yarn": Case(
        "Olmo3ForCausalLM",
        {
            "sliding_window": 24,
            "num_hidden_layers": 5,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": partial(1.0)},
        },
    ),
    "granite": Case(
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
            "tie_word_embeddings": True,
        },
    ),
    "stablelm": Case("StableLmForCausalLM", {"rope_parameters": partial(0.25)}),
    "stablelm-12b": Case(
        "StableLmForCausalLM",
        {
            "rope_parameters": partial(0.25),
            "qk_layernorm": True,
            "use_parallel_residual": True,
        },
    ),
    "stablelm-bias": Case("StableLmForCausalLM", {"rope_parameters": partial(0.25), "use_qkv_bias": True}),
    "starcoder2": Case("Starcoder2ForCausalLM"),
    "cohere": Case("CohereForCausalLM", {"logit_scale": 0.5}),
    # llama.cpp looks for the norms of a model of 64 layers only.
    "cohere-qk-norm": Case("CohereForCausalLM", {"use_qk_norm": True, "logit_scale": 0.5, "num_hidden_layers": 64}),
    "cohere2": Case(
        "Cohere2ForCausalLM",
        {"sliding_window": 24, "num_hidden_layers": 5, "logit_scale": 0.5},
        edit=lambda config: config.update(rotary_pct=1.0),
    ),
    "cohere2-transformers-5": Case(
        "Cohere2ForCausalLM", {"sliding_window": 24, "num_hidden_layers": 5, "logit_scale": 0.5}
    ),
    # llama.cpp knows the sliding window of the 32B model by its number of layers.
    "exaone4": Case("Exaone4ForCausalLM", {"sliding_window": 24, "num_hidden_layers": 64, "rope_parameters": LLAMA3}),
    "exaone4-full": Case(
        "Exaone4ForCausalLM",
        {"sliding_window": None, "sliding_window_pattern": None, "layer_types": sliding(0, 0, 0)},
    ),
    "ernie4_5": Case(
        "Ernie4_5ForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        tokenizer="sentencepiece",
    ),
    "hunyuan": Case("HunYuanDenseV1ForCausalLM", {"head_dim": 32}),
    "hunyuan-dynamic": Case(
        "HunYuanDenseV1ForCausalLM",
        {
            "head_dim": 32,
            "max_position_embeddings": 32768,
            "rope_parameters": DYNAMIC | {"alpha": 1000.0, "factor": 1.0},
        },
    ),
    "seed-oss": Case("SeedOssForCausalLM"),
    "nemotron": Case(
        "NemotronForCausalLM", {"rope_parameters": partial(0.5), "head_dim": 16}, tokenizer="sentencepiece"
    ),
    "apertus": Case("ApertusForCausalLM", {"rope_parameters": LLAMA3}),
    "minicpm3": Case(
        "MiniCPM3ForCausalLM",
        {
            "kv_lora_rank": 32,
            "q_lora_rank": 48,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
        },
        tokenizer="sentencepiece",
    ),
}

REFUSED: Mapping[str, Refusal] = {
    "qwen3-bias": Refusal(Case("Qwen3ForCausalLM", {"attention_bias": True}, tokenizer="qwen"), "attention_bias"),
    "ernie4_5-bias": Refusal(Case("Ernie4_5ForCausalLM", {"use_bias": True}, tokenizer="sentencepiece"), "use_bias"),
    "exaone4-few-layers": Refusal(
        Case("Exaone4ForCausalLM", {"sliding_window": 24, "num_hidden_layers": 5}), "layer_types"
    ),
    "cohere-qk-norm-few-layers": Refusal(Case("CohereForCausalLM", {"use_qk_norm": True}), "use_qk_norm"),
}
"""What llama.cpp's graphs do not compute."""
