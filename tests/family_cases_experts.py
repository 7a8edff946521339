"""Cases of mixtures of experts: shared experts, dense first layers, groups of experts, latent attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.family_cases_dense import LLAMA3, YARN, longrope, partial
from tests.family_checkpoints import Case, Refusal

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {"kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
DEEPSEEK_YARN = YARN | {"beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}
DEEPSEEK3 = {**LATENT, **ROUTED, "n_group": 4, "topk_group": 2, "num_key_value_heads": 4}
PHI_MOE = {
    "num_local_experts": 4,
    "rope_parameters": longrope(8) | {"short_mscale": 1.1547005, "long_mscale": 1.1547005},
    "original_max_position_embeddings": 64,
    "attention_bias": True,
    "lm_head_bias": True,
}


def predictor(tensors: dict[str, Any]) -> dict[str, Any]:
    """A layer after the last that predicts one token more, with what joins it, as GLM's and DeepSeek's have it."""
    last, added = "model.layers.2.", "model.layers.3."
    made = {name.replace(last, added): tensor.flip(0) for name, tensor in tensors.items() if name.startswith(last)}
    norm, embedding = tensors["model.norm.weight"], tensors["model.embed_tokens.weight"]
    names = ("enorm", "hnorm", "shared_head.norm")
    made |= {f"{added}{name}.weight": norm + 0.01 * i for i, name in enumerate(names)}
    made |= {f"{added}{name}.weight": embedding + 0.01 for name in ("embed_tokens", "shared_head.head")}
    return made | {f"{added}eh_proj.weight": embedding[: 2 * len(norm)].T}


CASES: Mapping[str, Case] = {
    "qwen2-moe": Case("Qwen2MoeForCausalLM", {**EXPERTS, "shared_expert_intermediate_size": 96}, tokenizer="qwen"),
    "qwen3-moe": Case("Qwen3MoeForCausalLM", {**EXPERTS, "norm_topk_prob": True, "head_dim": 32}, tokenizer="qwen"),
    "mixtral": Case(
        "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}, tokenizer="sentencepiece"
    ),
    "llama4": Case(
        "Llama4ForCausalLM",
        {
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 96,
            "num_hidden_layers": 5,
            "rope_parameters": LLAMA3,
        },
    ),
    "phi-moe": Case(
        "PhiMoEForCausalLM",
        PHI_MOE,
        model_class="PhimoeForCausalLM",
        tokenizer="sentencepiece",
        approximated="transformers weighs each of the two experts against its own rivals, llama.cpp by one softmax",
    ),
    "gpt-oss": Case(
        "GptOssForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
            "sliding_window": 24,
            "num_hidden_layers": 4,
            "head_dim": 64,
        },
    ),
    "glm4-moe": Case(
        "Glm4MoeForCausalLM",
        {**ROUTED, "rope_parameters": partial(0.5), "head_dim": 32, "attention_bias": True},
        tokenizer="glm",
    ),
    "glm4-moe-mtp": Case(
        "Glm4MoeForCausalLM",
        {**ROUTED, "rope_parameters": partial(0.5), "head_dim": 32, "attention_bias": True},
        tokenizer="glm",
        beside=predictor,
        edit=lambda config: config.update(num_nextn_predict_layers=1),
    ),
    "glm4-moe-qk-norm": Case(
        "Glm4MoeForCausalLM",
        {**ROUTED, "rope_parameters": partial(0.5), "head_dim": 32, "use_qk_norm": True},
        tokenizer="glm",
    ),
    "glm4-moe-lite": Case(
        "Glm4MoeLiteForCausalLM",
        {**LATENT, **{k: v for k, v in ROUTED.items() if k != "first_k_dense_replace"}, "num_key_value_heads": 4},
        tokenizer="glm",
        edit=lambda config: config.update(first_k_dense_replace=1, scoring_func="sigmoid"),
    ),
    "glm4-moe-lite-transformers-5": Case(
        "Glm4MoeLiteForCausalLM",
        {**LATENT, **{k: v for k, v in ROUTED.items() if k != "first_k_dense_replace"}, "num_key_value_heads": 4},
        tokenizer="glm",
    ),
    "deepseek2": Case("DeepseekV2ForCausalLM", {**LATENT, **ROUTED, "num_key_value_heads": 4}),
    # llama.cpp knows that queries are not compressed by the number of layers.
    "deepseek2-lite": Case(
        "DeepseekV2ForCausalLM",
        {
            **LATENT,
            **ROUTED,
            "num_hidden_layers": 27,
            "q_lora_rank": None,
            "num_key_value_heads": 4,
            "rope_parameters": DEEPSEEK_YARN,
        },
    ),
    "deepseek3": Case("DeepseekV3ForCausalLM", DEEPSEEK3, edit=lambda config: config.update(scoring_func="sigmoid")),
    "deepseek3-yarn": Case(
        "DeepseekV3ForCausalLM",
        {**DEEPSEEK3, "rope_parameters": DEEPSEEK_YARN},
        edit=lambda config: config.update(scoring_func="sigmoid"),
    ),
    "deepseek3-mtp": Case(
        "DeepseekV3ForCausalLM",
        DEEPSEEK3,
        beside=predictor,
        edit=lambda config: config.update(scoring_func="sigmoid", num_nextn_predict_layers=1),
    ),
    "deepseek3-transformers-5": Case("DeepseekV3ForCausalLM", DEEPSEEK3),
    "olmoe": Case("OlmoeForCausalLM", {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "granite-moe": Case(
        "GraniteMoeForCausalLM",
        {
            "num_local_experts": 4,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
        },
    ),
    "granite-moe-shared": Case(
        "GraniteMoeSharedForCausalLM",
        {
            "num_local_experts": 4,
            "shared_intermediate_size": 96,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
        },
    ),
    "ernie4_5-moe": Case(
        "Ernie4_5_MoeForCausalLM",
        {
            "intermediate_size": 256,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "moe_num_shared_experts": 2,
        },
        tokenizer="sentencepiece",
    ),
    "hunyuan-moe": Case(
        "HunYuanMoEV1ForCausalLM",
        {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
        edit=lambda config: config.update(
            moe_intermediate_size=[128] * 3, num_shared_expert=[1] * 3, moe_topk=[2] * 3
        ),
    ),
}

REFUSED: Mapping[str, Refusal] = {
    "qwen2-moe-normed": Refusal(
        Case(
            "Qwen2MoeForCausalLM",
            {**EXPERTS, "shared_expert_intermediate_size": 96, "norm_topk_prob": True},
            tokenizer="qwen",
        ),
        "norm_topk_prob",
    ),
    "deepseek2-groups": Refusal(
        Case(
            "DeepseekV2ForCausalLM",
            {
                **LATENT,
                **ROUTED,
                "num_key_value_heads": 4,
                "n_group": 2,
                "topk_group": 1,
                "topk_method": "group_limited_greedy",
            },
        ),
        "topk_method",
    ),
    "deepseek2-lite-few-layers": Refusal(
        Case("DeepseekV2ForCausalLM", {**LATENT, **ROUTED, "num_key_value_heads": 4, "q_lora_rank": None}),
        "q_lora_rank",
    ),
    "llama4-chunks": Refusal(
        Case("Llama4ForCausalLM", {"num_local_experts": 4, "intermediate_size_mlp": 96, "attention_chunk_size": 64}),
        "attention_chunk_size",
    ),
}
"""What llama.cpp's graphs do not compute."""
