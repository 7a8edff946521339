"""Llama 1 to 3.x and its kin (Yi, SmolLM2), the text part of SmolVLM, and Arcee."""

from dataclasses import replace

from models.families import ModelFamily
from models.families import vocabulary as rules
from models.families.keys import head_dim, integer
from models.families.passes import interleaved_rope

# transformers, LlamaConfig
LLAMA = ModelFamily(
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    gguf_arch="llama",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    keys={
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "vocab_size": integer("vocab_size"),
        "rope.dimension_count": head_dim,
    },
    passes=interleaved_rope(),
    ignored=("sliding_window", "is_llama_config"),
    vocabulary=rules.LLAMA,
)

# transformers, Idefics3Config, SmolVLMConfig: the part that reads text
SMOL_VLM = replace(
    LLAMA,
    architectures=("SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration"),
    ignored=(*LLAMA.ignored, "scale_factor"),
)

# transformers, ArceeConfig; its feed-forward networks have no gate
ARCEE = replace(
    LLAMA,
    architectures=("ArceeForCausalLM",),
    gguf_arch="arcee",
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "relu2"},
    requires={"hidden_act": ("relu2",)},
)
