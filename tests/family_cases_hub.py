"""Cases as repositories on the hub spell them: the configs of transformers 4 or of remote code, and older tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.checkpoints import Json
from tests.family_cases_dense import LLAMA3, longrope, partial, sliding
from tests.family_cases_recurrent import NEMOTRON_H
from tests.family_checkpoints import Case, Refusal


def spelt(**fields: Any) -> Any:
    """Fields over those that transformers 5 writes, without what it writes instead of them."""

    def edit(config: Json) -> None:
        for name in ("rope_parameters", "dtype", "layer_types"):
            config.pop(name, None)
        config.update({"torch_dtype": "bfloat16", **fields})

    return edit


def masks(layers: str, name: str) -> Any:
    """The causal mask of each block, which old checkpoints have beside the weights."""

    def make(tensors: dict[str, Any]) -> dict[str, Any]:
        import torch

        mask = torch.ones(256, 256).tril()[None, None]
        return {f"{layers}.{i}.{name}": mask.clone() for i in range(3)} | {
            f"{layers}.{i}.{name.replace('bias', 'masked_bias')}": torch.tensor(-1e4) for i in range(3)
        }

    return make


HUNYUAN = {
    "add_classification_head": False,
    "anyres_pooling_size": 2,
    "anyres_vit_max_image_size": None,
    "anyres_vit_two_views": False,
    "attention_head_dim": 32,
    "cla_share_factor": 2,
    "class_num": 0,
    "dense_list": [64, 0],
    "im_end_id": 5,
    "im_newline_id": 11,
    "im_start_id": 4,
    "kv_lora_rank": None,
    "mask_init_id": 12,
    "max_position_embeddings": 32768,
    "norm_type": "rms",
    "num_media_embeds": 257,
    "org_vocab_size": 49152,
    "pool_type": "last",
    "position_embedding_xdrope": False,
    "q_lora_rank": None,
    "rope_scaling": {
        "alpha": 1000.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "type": "dynamic",
    },
    "rope_theta": 10000.0,
    "skip_cls_token": False,
    "text_end_id": 7,
    "text_start_id": 6,
    "use_cla": False,
    "use_qk_norm": True,
    "use_rotary_pos_emb": True,
    "video_end_id": 10,
    "video_start_id": 9,
    "xdrope_section": None,
}
"""Beside what transformers knows."""

HUNYUAN_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0}


CASES: Mapping[str, Case] = {
    "yi": Case(
        "LlamaForCausalLM",
        {"rms_norm_eps": 1e-5, "num_attention_heads": 8, "head_dim": 8},
        tokenizer="sentencepiece",
        edit=spelt(
            rope_scaling=None, rope_theta=5000000.0, pretraining_tp=1, attention_bias=False, model_type="llama"
        ),
    ),
    "exaone4-hub": Case(
        "Exaone4ForCausalLM",
        {"sliding_window": 24, "num_hidden_layers": 64},
        edit=spelt(
            layer_types=sliding(*[1, 1, 1, 0] * 16),
            sliding_window_pattern="LLLG",
            rope_theta=500000,
            rope_scaling={name: value for name, value in LLAMA3.items() if name != "rope_theta"},
        ),
    ),
    "exaone4-pattern": Case("Exaone4ForCausalLM", {"sliding_window": 24, "num_hidden_layers": 64}, edit=spelt()),
    "ernie4_5-hub": Case(
        "Ernie4_5ForCausalLM", tokenizer="sentencepiece", edit=spelt(rope_theta=500000.0, use_bias=False)
    ),
    "ernie4_5-moe-hub": Case(
        "Ernie4_5_MoeForCausalLM",
        {
            "intermediate_size": 256,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "moe_num_shared_experts": 2,
        },
        tokenizer="sentencepiece",
        edit=spelt(
            rope_theta=500000.0,
            moe_capacity=[8, 8, 8],
            moe_gate="topk",
            moe_use_aux_free=True,
            num_nextn_predict_layers=1,
        ),
        beside=lambda tensors: {
            f"model.mtp_{part}": tensors["model.norm.weight"].clone()
            for part in ("emb_norm.0.weight", "hidden_norm.0.weight", "block.0.input_layernorm.weight")
        },
    ),
    "ernie4_5-moe-unshared": Case(
        "Ernie4_5_MoeForCausalLM",
        {
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 2,
        },
        tokenizer="sentencepiece",
    ),
    "hunyuan-hub": Case(
        "HunYuanDenseV1ForCausalLM",
        {"head_dim": 32, "max_position_embeddings": 32768, "rope_parameters": HUNYUAN_ROPE},
        edit=spelt(**HUNYUAN, enable_lm_head_fp32=True, num_experts=1),
    ),
    "hunyuan-moe-hub": Case(
        "HunYuanMoEV1ForCausalLM",
        {
            "num_experts": 4,
            "moe_topk": 2,
            "head_dim": 32,
            "max_position_embeddings": 32768,
            "rope_parameters": HUNYUAN_ROPE,
        },
        edit=spelt(
            **{**HUNYUAN, "kv_lora_rank": 512, "norm_type": "hf_rms", "mamba": False, "mamba_d_state": 128},
            moe_intermediate_size=[128] * 3,
            num_shared_expert=[1] * 3,
            moe_topk=[2] * 3,
            capacity_factor=1.0,
            group_limited_greedy=False,
            moe_drop_tokens=False,
            moe_layer_num_skipped=0,
            moe_random_routing_dropped_token=False,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
            use_mixed_mlp_moe=True,
            use_mla=False,
        ),
    ),
    "seed-oss-hub": Case(
        "SeedOssForCausalLM",
        {
            "attention_bias": True,
            "attention_out_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
        },
        edit=spelt(
            rope_scaling={"rope_type": "default"}, rope_theta=10000000.0, pretraining_tp=1, residual_dropout=0.1
        ),
    ),
    "gpt2-hub": Case(
        "GPT2LMHeadModel",
        edit=spelt(
            n_ctx=256,
            resid_pdrop=0.1,
            summary_activation=None,
            summary_first_dropout=0.1,
            task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
        ),
        rename=("^transformer\\.", ""),
        beside=masks("h", "attn.bias"),
    ),
    "gpt2-upcast": Case("GPT2LMHeadModel", {"reorder_and_upcast_attn": True}, edit=spelt(n_ctx=256)),
    "gpt-neox-hub": Case(
        "GPTNeoXForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5}},
        edit=spelt(rotary_pct=0.5, rotary_emb_base=20000, gradient_checkpointing=False, classifier_dropout=0.1),
        beside=masks("gpt_neox.layers", "attention.bias"),
    ),
    "gpt-neox-tied": Case("GPTNeoXForCausalLM", {"tie_word_embeddings": True}),
    "gpt-bigcode-heads": Case("GPTBigCodeForCausalLM", {"multi_query": False}),
    "gpt-bigcode-hub": Case(
        "GPTBigCodeForCausalLM",
        edit=spelt(
            attention_softmax_in_fp32=True,
            inference_runner=0,
            max_batch_size=None,
            max_sequence_length=None,
            n_inner=256,
            pad_key_length=True,
            pre_allocate_kv_cache=False,
            summary_type="cls_index",
            validate_runner_input=True,
        ),
    ),
    "mpt-hub": Case(
        "MPTForCausalLM",
        {"max_seq_len": 256, "n_heads": 6, "hidden_size": 96},
        model_class="MptForCausalLM",
        edit=spelt(
            attn_config={
                "alibi": True,
                "alibi_bias_max": 8,
                "attn_impl": "torch",
                "attn_pdrop": 0,
                "attn_type": "multihead_attention",
                "attn_uses_sequence_id": False,
                "clip_qkv": None,
                "prefix_lm": False,
                "qk_ln": False,
                "softmax_scale": None,
            },
            emb_pdrop=0,
            init_config={"emb_init_std": None, "name": "kaiming_normal_", "verbose": 0},
            init_device="cpu",
            tokenizer_name="EleutherAI/gpt-neox-20b",
            verbose=0,
        ),
    ),
    "bloom-hub": Case(
        "BloomModel",
        model_class="BloomForCausalLM",
        edit=lambda config: config.update(
            n_embed=config.pop("hidden_size"),
            num_attention_heads=config.pop("n_head"),
            attention_softmax_in_fp32=True,
            bias_dropout_fusion=True,
            masked_softmax_fusion=True,
            n_inner=None,
            offset_alibi=100,
            pretraining_tp=4,
            seq_length=256,
            skip_bias_add=True,
            skip_bias_add_qkv=False,
        ),
        rename=("^transformer\\.", ""),
    ),
    "falcon-7b-hub": Case(
        "FalconForCausalLM",
        edit=spelt(activation="gelu", ffn_hidden_size=256, num_kv_heads=4, num_ln_in_parallel_attn=None),
    ),
    "falcon-40b-oldest": Case(
        "RWForCausalLM",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        model_class="FalconForCausalLM",
        seed=2,
        edit=spelt(n_head_kv=2, apply_residual_connection_post_layernorm=False),
    ),
    "falcon2-11b": Case(
        "FalconForCausalLM",
        {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500042.0},
        },
        seed=2,
        edit=spelt(ff_factor=4, ffn_hidden_size=256, rope_theta=500042.0),
    ),
    "llama4-hub": Case(
        "Llama4ForCausalLM",
        {"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 96, "num_hidden_layers": 5},
        edit=spelt(
            attn_temperature_tuning=True,
            floor_scale=8192,
            for_llm_compressor=False,
            no_rope_layers=[],
            rope_theta=500000.0,
        ),
    ),
    "falcon-mamba": Case(
        "FalconMambaForCausalLM",
        {"state_size": 16, "intermediate_size": 128, "mixer_rms_eps": 1e-5},
        edit=spelt(rescale_prenorm_residual=False, time_step_rank=4, use_falcon_mambapy=False),
    ),
    "ernie4_5-first-name": Case("Ernie4_5_ForCausalLM", tokenizer="sentencepiece", model_class="Ernie4_5ForCausalLM"),
    "llama-first-name": Case(
        "LLaMAForCausalLM",
        {"max_position_embeddings": 256},
        tokenizer="sentencepiece",
        model_class="LlamaForCausalLM",
        edit=spelt(max_sequence_length=256),
    ),
    "mpt-transformers": Case("MptForCausalLM", {"max_seq_len": 256, "n_heads": 4}),
    "mamba-hub": Case(
        "MambaForCausalLM",
        {"state_size": 16, "intermediate_size": 128},
        edit=spelt(
            d_inner=128,
            d_model=64,
            fused_add_norm=True,
            n_layer=3,
            pad_vocab_size_multiple=8,
            rms_norm=True,
            ssm_cfg={},
        ),
    ),
    "mamba2-hub": Case(
        "Mamba2ForCausalLM",
        {"state_size": 16, "head_dim": 16, "num_heads": 8, "n_groups": 2},
        edit=spelt(intermediate_size=128, norm_before_gate=True, time_step_rank=256, use_mem_eff_path=True),
    ),
    "nemotron-h-hub": Case(
        "NemotronHForCausalLM",
        {**NEMOTRON_H, "layers_block_type": ["mamba", "mlp", "attention", "mlp", "mamba"]},
        edit=spelt(attention_head_dim=32, hybrid_override_pattern="M-*-M", num_hidden_layers=5, rms_norm_eps=1e-5),
    ),
    "nemotron-hub": Case(
        "NemotronForCausalLM",
        {"rope_parameters": partial(0.5), "head_dim": 16},
        tokenizer="sentencepiece",
        edit=spelt(kv_channels=16, rope_theta=10000, partial_rotary_factor=0.5, rope_percent=0.5),
    ),
    "cohere-hub": Case(
        "CohereForCausalLM",
        {"logit_scale": 0.5, "rope_parameters": {"rope_type": "default", "rope_theta": 8000000.0}},
        edit=spelt(model_max_length=512, pretraining_tp=1, rope_theta=8000000.0),
    ),
    "gemma2-hub": Case(
        "Gemma2ForCausalLM",
        {"sliding_window": 24, "num_hidden_layers": 4, "query_pre_attn_scalar": 32},
        tokenizer="gemma",
        edit=spelt(
            cache_implementation="hybrid", hidden_act="gelu_pytorch_tanh", rope_theta=10000.0, sliding_window_size=24
        ),
    ),
    "lfm2-hub": Case(
        "LFM2ForCausalLM",
        {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"], "block_multiple_of": 32},
        model_class="Lfm2ForCausalLM",
        edit=spelt(
            block_dim=64,
            block_ff_dim=128,
            block_use_swiglu=True,
            conv_dim=64,
            conv_dim_out=64,
            full_attn_idxs=[2],
            num_heads=4,
            rope_theta=1000000.0,
            theta=1000000.0,
            tie_embedding=True,
            use_pos_enc=True,
        ),
    ),
    "phi4-mini-hub": Case(
        "Phi3ForCausalLM",
        {
            "rope_parameters": longrope(6) | {"partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
        tokenizer="phi4",
        edit=lambda config: config.update(full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False),
    ),
    "smollm3-hub": Case(
        "SmolLM3ForCausalLM",
        {"num_hidden_layers": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0}},
        edit=spelt(
            max_window_layers=28,
            rope_scaling=None,
            rope_theta=5000000.0,
            sliding_window=None,
            use_sliding_window=False,
        ),
    ),
    "stablelm-epoch": Case(
        "StableLMEpochForCausalLM",
        {"rope_parameters": partial(0.25)},
        model_class="StableLmForCausalLM",
        edit=spelt(norm_eps=1e-5, num_heads=4, rope_pct=0.25, rope_theta=10000, rotary_scaling_factor=1.0),
    ),
    "starcoder": Case("GPTBigCodeForCausalLM", {"activation_function": "gelu"}),
}

REFUSED: Mapping[str, Refusal] = {
    "falcon-alibi": Refusal(Case("FalconForCausalLM", {"alibi": True}), "alibi"),
    "falcon-wide": Refusal(Case("FalconForCausalLM", edit=spelt(ff_factor=8)), "ff_factor"),
    "mamba-wide": Refusal(Case("MambaForCausalLM", {"state_size": 16}, edit=spelt(d_inner=256)), "d_inner"),
    "phi4-mini-interpolated": Refusal(
        Case("Phi3ForCausalLM", tokenizer="phi4", edit=spelt(interpolate_factor=2)), "interpolate_factor"
    ),
    "gpt2-scaled-by-layer": Refusal(
        Case("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}), "scale_attn_by_inverse_layer_idx"
    ),
    "gpt2-unscaled": Refusal(Case("GPT2LMHeadModel", {"scale_attn_weights": False}), "scale_attn_weights"),
    "gpt2-narrow": Refusal(Case("GPT2LMHeadModel", {"n_inner": 128}), "intermediate_size"),
    "gpt-neox-without-biases": Refusal(Case("GPTNeoXForCausalLM", {"attention_bias": False}), "attention_bias"),
    "ernie4_5-moe-interval": Refusal(
        Case(
            "Ernie4_5_MoeForCausalLM",
            {"moe_num_experts": 8, "moe_intermediate_size": 64, "moe_layer_interval": 2},
            tokenizer="sentencepiece",
        ),
        "moe_layer_interval",
    ),
    "hunyuan-shared-cache": Refusal(
        Case("HunYuanDenseV1ForCausalLM", {"head_dim": 32}, edit=spelt(use_cla=True)), "use_cla"
    ),
    "hunyuan-latent": Refusal(
        Case("HunYuanDenseV1ForCausalLM", {"head_dim": 32}, edit=spelt(use_mla=True, kv_lora_rank=512)), "use_mla"
    ),
    "hunyuan-without-norms": Refusal(
        Case("HunYuanDenseV1ForCausalLM", {"head_dim": 32}, edit=spelt(use_qk_norm=False)), "use_qk_norm"
    ),
    "mpt-scaled": Refusal(
        Case("MPTForCausalLM", {"attn_config": {"softmax_scale": 0.1}}, model_class="MptForCausalLM"), "attn_config"
    ),
    "bloom-residual": Refusal(
        Case("BloomForCausalLM", {"apply_residual_connection_post_layernorm": True}),
        "apply_residual_connection_post_layernorm",
    ),
}
"""What llama.cpp's graphs do not compute."""
