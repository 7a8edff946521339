"""Baichuan 1 and 2, XVERSE, Orion."""

from dataclasses import replace

from models.families import ModelFamily
from models.families.keys import absent, fixed, head_dim, number, other_theta
from models.families.passes import interleaved_rope, split
from models.hparams import Hparams


def _thirds(hparams: Hparams) -> list[tuple[str, int]]:
    width = hparams.integer("hidden_size")
    return [(rf"\1.{part}_proj.weight", width) for part in "qkv"]


# The code beside its checkpoints; llama.cpp tells the 13B models, whose attention fades with distance, by 40 blocks
BAICHUAN = ModelFamily(
    architectures=("BaichuanForCausalLM", "BaiChuanForCausalLM"),
    gguf_arch="baichuan",
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    aliases={"max_position_embeddings": "model_max_length"},
    keys={
        "attention.key_length": absent,
        "attention.value_length": absent,
        "tensor_data_layout": fixed("Meta AI original pth"),
        "rope.dimension_count": head_dim,
    },
    requires={"num_hidden_layers": (32, 40)},
    passes=(split(r"(.*\.self_attn)\.W_pack\.weight", _thirds), *interleaved_rope()),
    ignored=("max_position_embeddings", "position_embedding", "user_token_id", "assistant_token_id"),
)

# The code beside its checkpoints
XVERSE = replace(
    BAICHUAN,
    architectures=("XverseForCausalLM",),
    gguf_arch="xverse",
    aliases={},
    requires={},
    passes=interleaved_rope(),
    ignored=("max_tokenizer_truncation",),
)

# The code beside its checkpoints; its norms subtract the mean, whatever the config calls them
ORION = ModelFamily(
    architectures=("OrionForCausalLM",),
    gguf_arch="orion",
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    keys={
        "attention.key_length": absent,
        "attention.value_length": absent,
        "attention.layer_norm_rms_epsilon": absent,
        "attention.layer_norm_epsilon": number("rms_norm_eps"),
        "rope.freq_base": other_theta(10000.0),
        "tensor_data_layout": fixed("Meta AI original pth"),
    },
)
