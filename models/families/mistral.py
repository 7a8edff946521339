"""Mistral 1 to 3, Mixtral, Ministral 3, and SmolLM3."""

from dataclasses import replace

from models.families.keys import every_nth, rope_number
from models.families.llama import LLAMA

# transformers, MistralConfig; llama.cpp has no sliding window for it: equal up to the window, and a note says so
MISTRAL = replace(
    LLAMA,
    architectures=("MistralForCausalLM",),
    defaults={"max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
)

_PLAIN_KEYS = {key: LLAMA.keys[key] for key in ("vocab_size", "rope.dimension_count")}

# transformers, MixtralConfig
MIXTRAL = replace(
    LLAMA,
    architectures=("MixtralForCausalLM",),
    defaults={
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    keys=_PLAIN_KEYS,
)

# transformers, SmolLM3Config; llama.cpp leaves rope out of every fourth block
SMOLLM3 = replace(
    LLAMA,
    architectures=("SmolLM3ForCausalLM",),
    gguf_arch="smollm3",
    defaults={
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
    },
    requires={
        "no_rope_layers": every_nth(4, 0, others=1),
        "no_rope_layer_interval": (None, 4),
        "use_sliding_window": (None, False),
    },
    keys=_PLAIN_KEYS,
    ignored=(*LLAMA.ignored, "max_window_layers"),
)

# transformers, Ministral3Config, Mistral3Config
MISTRAL3 = replace(
    LLAMA,
    architectures=("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"),
    gguf_arch="mistral3",
    defaults={"max_position_embeddings": 262144, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "head_dim": 128},
    keys={
        **LLAMA.keys,
        "rope.scaling.yarn_log_multiplier": rope_number("mscale_all_dim"),
        "attention.temperature_scale": rope_number("llama_4_scaling_beta"),
    },
)
