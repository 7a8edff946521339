"""Gemma 1 to 3, the text part of the multimodal checkpoints included."""

from dataclasses import replace

from models.families import ModelFamily
from models.families import vocabulary as rules
from models.families.keys import head_dim, integer, number, other_theta, sliding_pattern, sliding_theta
from models.families.passes import drop, plus
from models.hparams import Hparams, Requirement

_GELU = ("gelu_pytorch_tanh", "gelu")  # Gemma 1's configs on the hub say gelu, and mean the other
_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "head_dim": 256, "tie_word_embeddings": True}


def _attention_scales(n_layers_27b: int) -> dict[str, Requirement]:
    """llama.cpp scales queries by the width of a head, and in the 27B models by hidden size over heads."""

    def scalars(hparams: Hparams) -> tuple[object, ...]:
        large = hparams.n_layers == n_layers_27b
        scalar = hparams.integer("hidden_size") // hparams.n_heads if large else hparams.head_dim
        return None, scalar, float(scalar)

    return {"query_pre_attn_scalar": scalars}


# transformers, GemmaConfig
GEMMA = ModelFamily(
    architectures=("GemmaForCausalLM",),
    gguf_arch="gemma",
    defaults={**_COMMON, "max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh"},
    requires={"hidden_act": _GELU, "use_bidirectional_attention": (None, False)},
    keys={
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": other_theta(10000.0),
    },
    passes=(plus(r".*norm\.weight", 1), drop(r"lm_head\.weight")),
    vocabulary=rules.GEMMA,
)

# transformers, Gemma2Config
GEMMA2 = replace(
    GEMMA,
    architectures=("Gemma2ForCausalLM",),
    gguf_arch="gemma2",
    defaults={
        **GEMMA.defaults,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    },
    requires={
        **GEMMA.requires,
        **_attention_scales(46),
        "sliding_window_size": lambda hparams: (None, hparams.get("sliding_window")),
    },
    keys={
        **GEMMA.keys,
        "attn_logit_softcapping": number("attn_logit_softcapping"),
        "final_logit_softcapping": number("final_logit_softcapping"),
        "attention.sliding_window": integer("sliding_window"),
        "attention.sliding_window_pattern": sliding_pattern(2),
    },
    vocabulary=rules.GEMMA2,
)

# transformers, Gemma3TextConfig
GEMMA3 = replace(
    GEMMA,
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    gguf_arch="gemma3",
    defaults={
        **GEMMA.defaults,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rope_theta": 1000000.0,
        "rope_local_theta": 10000.0,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    },
    requires={
        **GEMMA.requires,
        **_attention_scales(62),
        "attn_logit_softcapping": (None,),
        "sliding_window_pattern": (None, 6),
    },
    keys={
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base_swa": sliding_theta,
        "final_logit_softcapping": number("final_logit_softcapping"),
        "attention.sliding_window": integer("sliding_window"),
        "attention.sliding_window_pattern": sliding_pattern(6),
    },
    vocabulary=rules.GEMMA3,
)
