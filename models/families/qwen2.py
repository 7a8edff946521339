"""Qwen 1.5 to 2.5, dense."""

from models.families import ModelFamily

# transformers, Qwen2Config
QWEN2 = ModelFamily(
    architectures=("Qwen2ForCausalLM",),
    gguf_arch="qwen2",
    defaults={"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    requires={"use_sliding_window": (None, False)},
    ignored=("sliding_window", "max_window_layers"),  # of a window that is not in use
)
