"""DeepSeek 1 to 3, and GLM 4 Lite, which is built like DeepSeek V3."""

from collections.abc import Iterable
from dataclasses import replace
from re import Match

from models.families import ModelFamily
from models.families import vocabulary as rules
from models.families.keys import fixed, head_dim, integer, natural, number
from models.families.passes import each, interleaved_rope, without_blocks_beyond
from models.hparams import Hparams
from models.weights import Weights

_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_TRAINING = ("seq_aux", "ep_size", "num_nextn_predict_layers", "num_mtp_layers")

# The code beside its checkpoints, DeepseekConfig: transformers has it no more.
DEEPSEEK = ModelFamily(
    architectures=("DeepseekForCausalLM",),
    gguf_arch="deepseek",
    defaults={**_DEFAULTS, "first_k_dense_replace": 0},
    requires={"moe_layer_freq": (None, 1), "scoring_func": (None, "softmax"), "norm_topk_prob": (None, False)},
    keys={
        "expert_gating_func": lambda hparams: 1 if hparams.has("scoring_func") else None,
        "rope.dimension_count": head_dim,
        "rope.scaling.type": fixed("none"),
        "leading_dense_block_count": natural("first_k_dense_replace"),
        "vocab_size": integer("vocab_size"),
        "expert_feed_forward_length": integer("moe_intermediate_size"),
        "expert_weights_scale": fixed(1.0),
        "expert_shared_count": natural("n_shared_experts"),
    },
    passes=interleaved_rope(),
    ignored=_TRAINING,
)


def _split_kv(weights: Weights, hparams: Hparams, match: Match[str]) -> Iterable[tuple[str, Weights]]:
    """The matrix that expands keys and values, by head: keys transposed, since llama.cpp moves it to the queries."""
    n_keys, n_values = hparams.integer("qk_nope_head_dim"), hparams.integer("v_head_dim")
    heads = weights.grid.reshape(-1, n_keys + n_values)
    yield f"{match[1]}.k_b_proj.weight", weights.pick(heads[:, :n_keys]).transposed()
    yield f"{match[1]}.v_b_proj.weight", weights.pick(heads[:, n_keys:])


def _leading_dense(hparams: Hparams) -> int:
    given = hparams.natural("first_k_dense_replace")
    if hparams.has("mlp_layer_types"):
        kinds = hparams.items("mlp_layer_types")
        return next((block for block, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    return given


def _routing(hparams: Hparams) -> tuple[object, ...]:
    """llama.cpp picks groups of experts by their two best, as V3 does: by the best one, as V2, only if all count."""
    groups = hparams.get("n_group")
    all_count = groups in (None, 1) or groups == hparams.get("topk_group")
    return None, "greedy", "noaux_tc", *(("group_limited_greedy",) if all_count else ())


def _query_rank(hparams: Hparams) -> tuple[object, ...]:
    """llama.cpp knows the models whose queries are not compressed by their number of blocks."""
    rank = hparams.get("q_lora_rank")
    return (rank,) if rank is not None or hparams.n_layers in (26, 27) else ()


# transformers, DeepseekV2Config; llama.cpp computes its attention with one key for all heads
DEEPSEEK_V2 = ModelFamily(
    architectures=("DeepseekV2ForCausalLM",),
    gguf_arch="deepseek2",
    defaults={
        **_DEFAULTS,
        "first_k_dense_replace": 0,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_experts": 64,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "moe_intermediate_size": 1407,
        "topk_method": "greedy",
    },
    requires={
        "moe_layer_freq": (None, 1),
        "rope_interleave": (None, True),
        "topk_method": _routing,
        "q_lora_rank": _query_rank,
        "head_dim": lambda hparams: (None, hparams.integer("qk_rope_head_dim"), hparams.get("qk_head_dim")),
    },
    keys={
        "attention.head_count_kv": fixed(1),
        "leading_dense_block_count": _leading_dense,
        "vocab_size": integer("vocab_size"),
        "attention.q_lora_rank": integer("q_lora_rank"),
        "attention.kv_lora_rank": integer("kv_lora_rank"),
        "attention.key_length": lambda hparams: hparams.integer("kv_lora_rank") + hparams.integer("qk_rope_head_dim"),
        "attention.value_length": integer("kv_lora_rank"),
        "attention.key_length_mla": lambda hparams: (
            hparams.integer("qk_nope_head_dim") + hparams.integer("qk_rope_head_dim")
        ),
        "attention.value_length_mla": integer("v_head_dim"),
        "expert_feed_forward_length": integer("moe_intermediate_size"),
        "expert_shared_count": natural("n_shared_experts"),
        "expert_weights_scale": number("routed_scaling_factor"),
        "expert_weights_norm": lambda hparams: hparams.flag("norm_topk_prob") or None,
        "rope.dimension_count": integer("qk_rope_head_dim"),
        "rope.scaling.yarn_log_multiplier": lambda hparams: (
            0.1 * hparams.rope.number("mscale_all_dim") if hparams.rope.has("mscale_all_dim") else None
        ),
    },
    passes=(without_blocks_beyond, each(r"(.*)\.kv_b_proj\.weight", _split_kv)),
    ignored=(*_TRAINING, "num_key_value_heads"),
)

# transformers, DeepseekV3Config
DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    architectures=("DeepseekV3ForCausalLM",),
    defaults={
        **DEEPSEEK_V2.defaults,
        "max_position_embeddings": 4096,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
)

# transformers, Glm4MoeLiteConfig
GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    architectures=("Glm4MoeLiteForCausalLM",),
    defaults={
        **DEEPSEEK_V3.defaults,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "first_k_dense_replace": 1,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "num_experts": 64,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 1.8,
        "moe_intermediate_size": 1536,
        "n_group": 1,
        "topk_group": 1,
    },
    vocabulary=rules.GLM4_MOE,
)
