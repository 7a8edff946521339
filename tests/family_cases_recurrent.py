"""Cases of models with memory other than attention: state spaces, gated delta nets, short convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.checkpoints import Json
from tests.family_checkpoints import Case

DELTA_NET = {
    "num_hidden_layers": 5,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [3, 3, 2],
    "mrope_interleaved": True,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
}
STATE_SPACE = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2}
GRANITE_HYBRID = {
    **STATE_SPACE,
    "num_hidden_layers": 4,
    "layer_types": ["mamba", "attention", "mamba", "mamba"],
    "num_local_experts": 4,
    "shared_intermediate_size": 96,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
}
NEMOTRON_H = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2}


def _without_experts(config: Json) -> None:
    """As NVIDIA's repositories have it: the kinds of layers are letters, and only a mixture names experts."""
    config["hybrid_override_pattern"] = "M-*-M"
    for name in [name for name in config if "expert" in name or name.startswith("moe_")]:
        del config[name]


def _older_layer_types(config: Json) -> None:
    """As transformers wrote them before it had one set of names for all families."""
    names = {"linear_attention": "mamba", "full_attention": "attention"}
    config["layer_types"] = [names[kind] for kind in config["layer_types"]]


def predictor(tensors: dict[str, Any]) -> dict[str, Any]:
    """Layers that predict one token more, as Qwen's checkpoints have them: an attention layer and what joins it."""
    layer, norm = "model.layers.3.", tensors["model.norm.weight"]
    made = {name.replace(layer, "mtp.layers.0."): tensor.flip(0) for name, tensor in tensors.items() if layer in name}
    names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    made |= {f"mtp.{name}.weight": norm + 0.01 * i for i, name in enumerate(names)}
    return made | {"mtp.fc.weight": tensors["model.embed_tokens.weight"][: 2 * len(norm)].T}


CASES: Mapping[str, Case] = {
    "qwen3-next": Case("Qwen3NextForCausalLM", {**DELTA_NET, **EXPERTS}, tokenizer="qwen", peer_options=("--no-mtp",)),
    "qwen3-next-mtp": Case("Qwen3NextForCausalLM", {**DELTA_NET, **EXPERTS}, tokenizer="qwen", beside=predictor),
    "qwen3.5": Case(
        "Qwen3_5ForCausalLM",
        {**DELTA_NET, "rope_parameters": MROPE, "tie_word_embeddings": True},
        tokenizer="qwen",
        peer_options=("--no-mtp",),
    ),
    "qwen3.5-mtp": Case(
        "Qwen3_5ForCausalLM",
        {**DELTA_NET, "rope_parameters": MROPE},
        tokenizer="qwen",
        beside=predictor,
        edit=lambda config: config.update(mtp_num_hidden_layers=1),
    ),
    "qwen3.5-moe": Case(
        "Qwen3_5MoeForCausalLM",
        {**DELTA_NET, **EXPERTS, "rope_parameters": MROPE},
        tokenizer="qwen",
        peer_options=("--no-mtp",),
    ),
    "lfm2": Case(
        "Lfm2ForCausalLM",
        {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"], "block_multiple_of": 32},
    ),
    "lfm2-moe": Case(
        "Lfm2MoeForCausalLM",
        {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_dense_layers": 1,
            "moe_intermediate_size": 64,
        },
    ),
    "granite-hybrid": Case("GraniteMoeHybridForCausalLM", GRANITE_HYBRID, edit=_older_layer_types),
    "granite-hybrid-transformers-5": Case("GraniteMoeHybridForCausalLM", GRANITE_HYBRID),
    "granite-hybrid-dense": Case(
        "GraniteMoeHybridForCausalLM",
        {
            **STATE_SPACE,
            "num_hidden_layers": 3,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 128,
        },
        edit=_older_layer_types,
    ),
    "granite-hybrid-attention": Case(
        "GraniteMoeHybridForCausalLM",
        {
            **STATE_SPACE,
            "num_hidden_layers": 3,
            "layer_types": ["attention"] * 3,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 128,
            "position_embedding_type": "rope",
        },
        edit=_older_layer_types,
    ),
    "falcon-h1": Case(
        "FalconH1ForCausalLM",
        {
            **STATE_SPACE,
            "mamba_d_ssm": 128,
            "lm_head_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "mlp_multipliers": [0.9, 0.8],
            "key_multiplier": 0.7,
            "attention_out_multiplier": 0.8,
            "attention_in_multiplier": 1.1,
            "ssm_multipliers": [0.9, 0.8, 0.7, 0.6, 1.2],
            "ssm_in_multiplier": 1.2,
            "ssm_out_multiplier": 0.7,
        },
        edit=lambda config: config.update(head_dim=16),
    ),
    "falcon-h1-transformers-5": Case("FalconH1ForCausalLM", {**STATE_SPACE, "mamba_d_ssm": 128}),
    "falcon-h1-rms-norm": Case(
        "FalconH1ForCausalLM",
        {**STATE_SPACE, "mamba_d_ssm": 128, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
        edit=lambda config: config.update(head_dim=16),
    ),
    "mamba": Case("MambaForCausalLM", {"state_size": 16, "intermediate_size": 128}),
    "mamba2": Case("Mamba2ForCausalLM", {"state_size": 16, "head_dim": 16, "num_heads": 8, "n_groups": 2}),
    "nemotron-h": Case(
        "NemotronHForCausalLM",
        {**NEMOTRON_H, "layers_block_type": ["mamba", "mlp", "attention", "mlp", "mamba"]},
        edit=_without_experts,
    ),
    "nemotron-h-transformers-5": Case(
        "NemotronHForCausalLM", {**NEMOTRON_H, "layers_block_type": ["mamba", "mlp", "attention", "mlp", "mamba"]}
    ),
    "nemotron-h-moe": Case(
        "NemotronHForCausalLM",
        {
            **NEMOTRON_H,
            "layers_block_type": ["mamba", "moe", "attention", "moe", "mamba"],
            "n_routed_experts": 4,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 96,
        },
    ),
}
