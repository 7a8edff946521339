"""OLMo 1 to 3 and OLMoE."""

from dataclasses import replace

from models.families import ModelFamily
from models.families.keys import fixed, integer, number, sliding_pattern
from models.families.passes import interleaved_rope

# transformers, OlmoConfig; its norms have no weights
OLMO = ModelFamily(
    architectures=("OlmoForCausalLM", "OLMoForCausalLM"),
    gguf_arch="olmo",
    defaults={"max_position_embeddings": 2048, "rope_theta": 10000.0},
    keys={"attention.layer_norm_epsilon": fixed(1e-5), "attention.clamp_kqv": number("clip_qkv")},
    passes=interleaved_rope(),
)

# transformers, Olmo2Config
OLMO2 = ModelFamily(
    architectures=("Olmo2ForCausalLM",),
    gguf_arch="olmo2",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
)

# transformers, Olmo3Config; its window layers know no scaling of rope, in llama.cpp either
OLMO3 = replace(
    OLMO2,
    architectures=("Olmo3ForCausalLM",),
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "sliding_window": 4096},
    keys={
        "attention.sliding_window": integer("sliding_window"),
        "attention.sliding_window_pattern": sliding_pattern(4, always=True),
        "rope.freq_base_swa": lambda hparams: hparams.rope_of("sliding_attention").theta,
    },
)

# transformers, OlmoeConfig; llama.cpp neither clamps nor normalises here
OLMOE = ModelFamily(
    architectures=("OlmoeForCausalLM",),
    gguf_arch="olmoe",
    defaults={
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
    requires={"clip_qkv": (None,), "norm_topk_prob": (None, False)},
)
