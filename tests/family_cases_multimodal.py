"""Cases of multimodal checkpoints, of which the text part is converted."""

from __future__ import annotations

from collections.abc import Mapping

from tests.family_cases_gemma import GEMMA4, softer
from tests.family_cases_recurrent import DELTA_NET, EXPERTS, MROPE
from tests.family_checkpoints import Case

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
QWEN_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}

SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}

CASES: Mapping[str, Case] = {
    "gemma3-vision": Case(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {"sliding_window": 24, "num_hidden_layers": 7, "query_pre_attn_scalar": 32},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
        },
        tokenizer="gemma",
    ),
    "gemma4-vision": Case(
        "Gemma4ForConditionalGeneration",
        {"text_config": GEMMA4, "vision_config": {**VISION, "head_dim": 16, "num_key_value_heads": 2}},
        tokenizer="gemma4",
        adjust=softer,
    ),
    "mistral3": Case(
        "Mistral3ForConditionalGeneration",
        {"text_config": {"model_type": "ministral3"}, "vision_config": {"model_type": "pixtral", **VISION}},
    ),
    "llama4-vision": Case(
        "Llama4ForConditionalGeneration",
        {
            "text_config": {
                "num_local_experts": 4,
                "intermediate_size_mlp": 96,
                "num_hidden_layers": 5,
            },
            "vision_config": {
                **VISION,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
        },
        text_part="language_model",
    ),
    "smolvlm": Case(
        "SmolVLMForConditionalGeneration",
        {"text_config": {"model_type": "llama"}, "vision_config": VISION, "image_token_id": 3},
    ),
    "idefics3": Case(
        "Idefics3ForConditionalGeneration",
        {"text_config": {"model_type": "llama"}, "vision_config": VISION, "image_token_id": 3},
    ),
    "qwen2-vl": Case(
        "Qwen2VLForConditionalGeneration",
        {"text_config": {"rope_parameters": SECTIONS}, "vision_config": {**QWEN_VISION, "embed_dim": 32}},
        tokenizer="qwen",
    ),
    "qwen2.5-vl": Case(
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": {"rope_parameters": SECTIONS}, "vision_config": QWEN_VISION},
        tokenizer="qwen",
    ),
    "qwen3-vl": Case(
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0, "mrope_section": [8, 4, 4]}},
            "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
        },
        tokenizer="qwen",
    ),
    "qwen3.5-vision": Case(
        "Qwen3_5ForConditionalGeneration",
        {"text_config": {**DELTA_NET, "rope_parameters": MROPE}, "vision_config": QWEN_VISION},
        tokenizer="qwen",
        peer_options=("--no-mtp",),
    ),
    "qwen3.5-moe-vision": Case(
        "Qwen3_5MoeForConditionalGeneration",
        {"text_config": {**DELTA_NET, **EXPERTS, "rope_parameters": MROPE}, "vision_config": QWEN_VISION},
        tokenizer="qwen",
        peer_options=("--no-mtp",),
    ),
}
