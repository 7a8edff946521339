"""Hunyuan, dense and mixture of experts."""

from models.errors import CheckpointError
from models.families import Getter, ModelFamily, Value
from models.families import vocabulary as rules
from models.families.keys import COMMON, absent, integer
from models.hparams import Hparams, Requirement

_LONG_CONTEXT = 256 * 1024


def _if_dynamic(value: Getter, otherwise: Getter) -> Getter:
    """Hunyuan's rope scaling of this name stretches the base frequency once for all, for a context of 256k."""

    def chosen(hparams: Hparams) -> Value | None:
        usual = otherwise(hparams)  # read in any case
        return value(hparams) if hparams.rope.type == "dynamic" else usual

    return chosen


def _stretched(hparams: Hparams) -> float:
    dim, alpha = hparams.head_dim, hparams.rope.number("alpha", 1000)
    if dim <= 2 or not 1 <= alpha <= 1e9 or not 0 < hparams.rope.theta <= 1e9:
        raise CheckpointError("config.json: alpha, rope_theta and the width of a head give no base frequency")
    return float(hparams.rope.theta * alpha ** (dim / (dim - 2)))


_ROPE: dict[str, Getter] = {
    "context_length": _if_dynamic(lambda hparams: _LONG_CONTEXT, COMMON["context_length"]),
    "rope.freq_base": _if_dynamic(_stretched, COMMON["rope.freq_base"]),
    "rope.scaling.type": _if_dynamic(lambda hparams: "none", COMMON["rope.scaling.type"]),
    "rope.scaling.factor": _if_dynamic(lambda hparams: 1.0, COMMON["rope.scaling.factor"]),
    "rope.scaling.original_context_length": _if_dynamic(
        lambda hparams: _LONG_CONTEXT, COMMON["rope.scaling.original_context_length"]
    ),
}


def _same_everywhere(name: str, otherwise: str) -> Getter:
    """A number, or a list with the same number for each block."""

    def value(hparams: Hparams) -> int:
        given = hparams.get(name)
        if isinstance(given, list) and given and given.count(given[0]) == len(given):
            return hparams.naturals(name)[0]
        return hparams.natural(name if given is not None else otherwise)

    return value


# What the code beside the checkpoints can do otherwise, and what is of Hunyuan's models for pictures
_PLAIN: dict[str, Requirement] = {
    "norm_type": (None, "rms", "hf_rms"),
    "use_qk_norm": (None, True),
    "use_rotary_pos_emb": (None, True),
    "attention_head_dim": lambda hparams: (None, hparams.head_dim),
}
_OTHERS = (
    *("anyres_pooling_size", "anyres_vit_max_image_size", "anyres_vit_two_views", "vit_add_patchemb_bias"),
    *("vit_input_resolution", "vit_mapping_type", "vit_norm_type", "vit_patch", "vit_remove_prenorm", "vit_token"),
    *("vit_type", "vit_used_rms_norm", "num_media_embeds", "xdrope_section", "skip_cls_token"),
    *("im_start_id", "im_end_id", "im_newline_id", "text_start_id", "text_end_id", "video_start_id", "video_end_id"),
    *("mask_init_id", "pad_id", "org_vocab_size", "dense_list", "pool_type", "class_num", "add_classification_head"),
    *("cla_share_factor", "enable_lm_head_fp32", "max_seq_length", "mask_id", "vit_path"),
    # of attention and of layers that `use_mla` and `mamba` switch on, which are refused
    *("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "chunk_size"),
    *("mamba_ssm_ngroups", "mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_head_dim"),
)

# transformers, HunYuanDenseV1Config
HUNYUAN = ModelFamily(
    architectures=("HunYuanDenseV1ForCausalLM",),
    gguf_arch="hunyuan-dense",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    requires={**_PLAIN, "num_experts": (None, 1)},
    keys={**_ROPE, "expert_count": absent},
    ignored=_OTHERS,
    vocabulary=rules.HUNYUAN,
)

# transformers, HunYuanMoEV1Config
HUNYUAN_MOE = ModelFamily(
    architectures=("HunYuanMoEV1ForCausalLM",),
    gguf_arch="hunyuan-moe",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    keys={
        **_ROPE,
        "expert_used_count": _same_everywhere("moe_topk", "num_experts_per_tok"),
        "expert_feed_forward_length": _same_everywhere("moe_intermediate_size", "intermediate_size"),
        "expert_shared_feed_forward_length": integer("intermediate_size"),
        "expert_shared_count": lambda hparams: (
            _same_everywhere("num_shared_expert", "")(hparams) if hparams.has("num_shared_expert") else 1
        ),
    },
    requires={**_PLAIN, "use_mixed_mlp_moe": (None, True), "moe_layer_num_skipped": (None, 0)},
    ignored=(*_OTHERS, "moe_drop_tokens", "moe_random_routing_dropped_token", "capacity_factor"),
    vocabulary=rules.HUNYUAN_MOE,
)
