"""Cases as repositories on the hub spell them: the configs of transformers 4 or of remote code, and older tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.checkpoints import Json
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


CASES: Mapping[str, Case] = {
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
}

REFUSED: Mapping[str, Refusal] = {
    "gpt2-scaled-by-layer": Refusal(
        Case("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}), "scale_attn_by_inverse_layer_idx"
    ),
    "gpt2-unscaled": Refusal(Case("GPT2LMHeadModel", {"scale_attn_weights": False}), "scale_attn_weights"),
    "gpt2-narrow": Refusal(Case("GPT2LMHeadModel", {"n_inner": 128}), "intermediate_size"),
    "gpt-neox-without-biases": Refusal(Case("GPTNeoXForCausalLM", {"attention_bias": False}), "attention_bias"),
    "mpt-scaled": Refusal(
        Case("MPTForCausalLM", {"attn_config": {"softmax_scale": 0.1}}, model_class="MptForCausalLM"), "attn_config"
    ),
    "bloom-residual": Refusal(
        Case("BloomForCausalLM", {"apply_residual_connection_post_layernorm": True}),
        "apply_residual_connection_post_layernorm",
    ),
}
"""What llama.cpp's graphs do not compute."""
