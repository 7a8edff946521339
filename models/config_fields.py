"""What the fields of `config.json` mean to a converter: other spellings, and those that change nothing.

A field that no family reads and that is neither here would be lost silently, and the file might answer wrongly. So
`Hparams.refuse_unread` refuses it by name.
"""

from __future__ import annotations

import fnmatch
import re

# LlamaConfig's name of a field -> how other configs call it.
ALIASES: dict[str, tuple[str, ...]] = {
    "max_position_embeddings": ("n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length"),
    "hidden_size": ("n_embd", "d_model", "n_embed"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "intermediate_size": ("n_inner", "ffn_hidden_size", "ffn_dim"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("n_kv_heads", "num_kv_heads", "n_head_kv"),
    "rms_norm_eps": ("norm_eps",),
    "layer_norm_eps": ("layer_norm_epsilon", "norm_epsilon"),
    "rope_theta": ("rotary_emb_base", "global_rope_theta", "rope_global_theta"),
    "rope_local_theta": ("local_rope_theta", "rope_local_base_freq", "swa_rope_theta"),
    "partial_rotary_factor": ("rope_pct", "rotary_pct", "rope_percent", "rope_percentage", "rotary_percentage"),
    "hidden_act": ("hidden_activation", "activation_function"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_token", "top_k_experts", "moe_k", "moe_topk"),
    "tie_word_embeddings": ("tie_embedding",),
    "scoring_func": ("score_function", "score_func", "moe_router_activation_func"),
}

# Values that leave a model as it is, where None and False are not all of them, or False is none.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention_multiplier": (None, 1, 1.0),
    "attn_logit_softcapping": (None, 0, 0.0),
    "embedding_multiplier": (None, 1, 1.0),
    "final_logit_softcapping": (None, 0, 0.0),
    "hidden_act": (None, "silu", "swish"),
    "is_causal": (None, True),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "norm_topk_prob": (None, True),
    "num_experts": (None, 0),
    "partial_rotary_factor": (None, 1, 1.0),
    "pretraining_tp": (None, 0, 1, 2, 4, 8),
    "residual_multiplier": (None, 1, 1.0),
    "routed_scaling_factor": (None, 1, 1.0),
    "scale_attn_weights": (None, True),
    "n_group": (None, 1),
    "topk_group": (None, 1),
}
_CANONICAL = {spelling: name for name, spellings in ALIASES.items() for spelling in spellings}

# About files, generation, training, other tasks and other parts of a multimodal model: not about a token's logits.
# Whether there are biases, and an output matrix of its own, the tensors tell.
_INERT = """
    _* architectures auto_map model_type *version *dtype name_or_path custom_pipelines tokenizer_class tokenizer_type
    quantization_config
    neftune* *model_max_length
    *token_id *token_ids *token_index *_token prefix task_specific_params finetuning_task problem_type unsloth*
    is_decoder is_encoder_decoder add_cross_attention cross_attention_* chunk_size_feed_forward tie_encoder_decoder
    id2label label2id num_labels return_dict* output_attentions output_hidden_states output_scores output_router_logits
    torchscript pruned_heads use_bfloat16 tf_legacy_loss summary_* use_cache* cache_implementation *flash_att*
    attn_implementation fused_* use_mambapy *dropout* *pdrop initializer* *_init* init_* rescale_prenorm_residual
    *aux_loss* router_z_loss* *jitter* gradient_checkpointing *loss_* *_loss z_loss* training_* train_* bf16 fp16 fp32
    do_sample temperature top_k top_p typical_p repetition_penalty length_penalty *no_repeat_ngram_size max_length
    min_length max_new_tokens num_beams num_beam_groups diversity_penalty early_stopping num_return_sequences
    bad_words_ids remove_invalid_values exponential_decay_length_penalty *suppress_tokens forced_* sep_token*
    decoder_start* transformers.js_config
    *_bias use_*bias bias no_bias tie_word_embeddings tie_embedding
    vision_* image_* video_* audio_* mm_* multimodal_* projector_* visual* *_image_* spatial_merge_size
""".split()  # noqa: SIM905 - a word a line would fill pages
_INERT_NAME = re.compile("|".join(fnmatch.translate(pattern) for pattern in _INERT))


def is_inert(name: str) -> bool:
    """Whether a field has nothing to do with what the text model computes."""
    return _INERT_NAME.fullmatch(name) is not None


def is_neutral(name: str, value: object) -> bool:
    """Whether a model with this value of a field is the same as one without the field."""
    known = _NEUTRAL.get(_CANONICAL.get(name, name))
    if known is not None:
        return any(value == neutral and type(value) is type(neutral) for neutral in known)
    if isinstance(value, list):
        return all(item == "full_attention" for item in value)  # layer_types; and the empty list
    return value in (None, False, 0, "", {})
