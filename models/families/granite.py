"""Granite, dense and mixtures of experts."""

from dataclasses import replace

from models.families import ModelFamily
from models.families import vocabulary as rules
from models.families.keys import absent, head_dim, integer, number
from models.families.passes import halves, interleaved_rope, rename

# transformers, GraniteConfig
GRANITE = ModelFamily(
    architectures=("GraniteForCausalLM",),
    gguf_arch="granite",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    keys={
        "attention.key_length": absent,
        "attention.value_length": absent,
        "vocab_size": integer("vocab_size"),
        "rope.dimension_count": head_dim,
        "attention.scale": number("attention_multiplier"),
        "embedding_scale": number("embedding_multiplier"),
        "residual_scale": number("residual_multiplier"),
        "logit_scale": number("logits_scaling"),
    },
    passes=interleaved_rope(),
    vocabulary=rules.GRANITE,
)

EXPERTS = (
    halves(
        r"(.*)\.block_sparse_moe\.input_linear\.weight",
        r"\1.mlp.experts.gate_proj.weight",
        r"\1.mlp.experts.up_proj.weight",
    ),
    rename(r"(.*)\.block_sparse_moe\.output_linear\.weight", r"\1.mlp.experts.down_proj.weight"),
)
SHARED = halves(
    r"(.*)\.shared_mlp\.input_linear\.weight",
    r"\1.mlp.shared_expert.gate_proj.weight",
    r"\1.mlp.shared_expert.up_proj.weight",
)

# transformers, GraniteMoeConfig, GraniteMoeSharedConfig
GRANITE_MOE = replace(
    GRANITE,
    architectures=("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
    gguf_arch="granitemoe",
    defaults={**GRANITE.defaults, "num_experts": 8, "num_experts_per_tok": 2},
    keys={
        **GRANITE.keys,
        "expert_shared_feed_forward_length": lambda hparams: (
            (hparams.natural("shared_intermediate_size") or None) if hparams.has("shared_intermediate_size") else None
        ),
    },
    passes=(*GRANITE.passes, *EXPERTS, SHARED),
)
