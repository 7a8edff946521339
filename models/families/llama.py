"""Llama 1 to 3.x and its kin (Yi, SmolLM2), and Mistral, which llama.cpp computes as llama."""

from models.families import ModelFamily
from models.families import vocabulary as rules

# transformers, LlamaConfig
LLAMA = ModelFamily(
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    gguf_arch="llama",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    interleaved_rope=True,
    head_dim_key=True,
    extra_keys=("vocab_size", "rope.dimension_count"),
    vocabulary=rules.LLAMA,
)

# transformers, MistralConfig
MISTRAL = ModelFamily(
    architectures=("MistralForCausalLM",),
    gguf_arch="llama",
    defaults={"max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    interleaved_rope=True,
    head_dim_key=True,
    extra_keys=("vocab_size", "rope.dimension_count"),
    vocabulary=rules.LLAMA,
)
