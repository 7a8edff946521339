"""Cases of families whose code lies beside their checkpoints and whose tensors have Llama's names, or nearly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints import Json
from tests.family_checkpoints import Case
from tests.numpy_decoder import Block, Decoder
from tests.remote_family import (
    BPE,
    HEAD_DIM,
    HEADS,
    HEADS_KV,
    HIDDEN,
    LAYERS,
    LLAMA_CONFIG,
    PARTS,
    SPM,
    WIDTH,
    Arrays,
    Remote,
    case,
    llama_block,
    llama_ends,
    llama_shapes,
    outside,
    without,
)

# Baichuan: queries, keys and values in one matrix


def packed_shapes(i: int) -> dict[str, tuple[int, ...]]:
    at = f"model.layers.{i}.self_attn"
    shapes = llama_shapes(i)
    return {name: size for name, size in shapes.items() if f"{at}.o" in name or "self_attn" not in name} | {
        f"{at}.W_pack.weight": (3 * HIDDEN, HIDDEN)
    }


def packed_block(tensors: Arrays, i: int) -> Block:
    q, k, v = np.split(tensors[f"model.layers.{i}.self_attn.W_pack.weight"], 3)
    return {**llama_block(tensors, i), "q": q, "k": k, "v": v}


BAICHUAN_CONFIG = {
    **without(LLAMA_CONFIG, "num_key_value_heads", "max_position_embeddings"),
    "model_max_length": 256,
    "_from_model_config": True,
    "z_loss_weight": 0,
}
BAICHUAN = Remote(
    {**BAICHUAN_CONFIG, "num_hidden_layers": 32},
    Decoder(HEADS, HEADS),
    packed_shapes,
    packed_block,
    llama_ends,
    outside(SPM),
    layers=32,
)
BAICHUAN_13B = Remote(
    {**BAICHUAN_CONFIG, "num_hidden_layers": 40, "position_embedding": "ALIBI"},
    Decoder(HEADS, HEADS, rope="none", alibi=8.0),
    packed_shapes,
    packed_block,
    llama_ends,
    outside(SPM),
    layers=40,
)
ORION_NORMS = ("norm", "ffn_norm")


def orion_shapes(i: int) -> dict[str, tuple[int, ...]]:
    biases = {f"model.layers.{i}.{PARTS[part]}".replace("weight", "bias"): (HIDDEN,) for part in ORION_NORMS}
    return llama_shapes(i) | biases


def orion_block(tensors: Arrays, i: int) -> Block:
    named = {f"{part}_bias": f"model.layers.{i}.{PARTS[part]}".replace("weight", "bias") for part in ORION_NORMS}
    return {**llama_block(tensors, i), **{part: tensors[name] for part, name in named.items()}}


def orion_ends(tensors: Arrays) -> tuple[NDArray[Any], Block]:
    embedding, end = llama_ends(tensors)
    return embedding, {**end, "norm_bias": tensors["model.norm.bias"]}


# InternLM 2: each group of queries with its key and value


def internlm_shapes(i: int) -> dict[str, tuple[int, ...]]:
    at = f"model.layers.{i}"
    return {
        f"{at}.attention_norm.weight": (HIDDEN,),
        f"{at}.attention.wqkv.weight": ((HEADS + 2 * HEADS_KV) * HEAD_DIM, HIDDEN),
        f"{at}.attention.wo.weight": (HIDDEN, HIDDEN),
        f"{at}.ffn_norm.weight": (HIDDEN,),
        f"{at}.feed_forward.w1.weight": (WIDTH, HIDDEN),
        f"{at}.feed_forward.w3.weight": (WIDTH, HIDDEN),
        f"{at}.feed_forward.w2.weight": (HIDDEN, WIDTH),
    }


def internlm_block(tensors: Arrays, i: int) -> Block:
    at = f"model.layers.{i}"
    packed = tensors[f"{at}.attention.wqkv.weight"].reshape(HEADS_KV, HEADS // HEADS_KV + 2, HEAD_DIM, HIDDEN)
    return {
        "norm": tensors[f"{at}.attention_norm.weight"],
        "q": packed[:, :-2].reshape(-1, HIDDEN),
        "k": packed[:, -2].reshape(-1, HIDDEN),
        "v": packed[:, -1].reshape(-1, HIDDEN),
        "o": tensors[f"{at}.attention.wo.weight"],
        "ffn_norm": tensors[f"{at}.ffn_norm.weight"],
        "gate": tensors[f"{at}.feed_forward.w1.weight"],
        "up": tensors[f"{at}.feed_forward.w3.weight"],
        "down": tensors[f"{at}.feed_forward.w2.weight"],
    }


def internlm_ends(tensors: Arrays) -> tuple[NDArray[Any], Block]:
    end = {"norm": tensors["model.norm.weight"], "output": tensors["output.weight"]}
    return tensors["model.tok_embeddings.weight"], end


# DeepSeek 1: a dense block first, then experts beside what all tokens share

N_EXPERTS, EXPERT_WIDTH = 4, 32


def deepseek_shapes(i: int) -> dict[str, tuple[int, ...]]:
    shapes = llama_shapes(i)
    if i == 0:
        return shapes
    at = f"model.layers.{i}.mlp"
    shapes = {name: size for name, size in shapes.items() if ".mlp." not in name}
    shapes[f"{at}.gate.weight"] = (N_EXPERTS, HIDDEN)
    for part, width in (*((f"experts.{n}", EXPERT_WIDTH) for n in range(N_EXPERTS)), ("shared_experts", EXPERT_WIDTH)):
        shapes |= {f"{at}.{part}.{name}_proj.weight": (width, HIDDEN) for name in ("gate", "up")}
        shapes[f"{at}.{part}.down_proj.weight"] = (HIDDEN, width)
    return shapes


def deepseek_block(tensors: Arrays, i: int) -> Block:
    block = dict(llama_block(tensors, i))
    at = f"model.layers.{i}.mlp"
    if i:
        block["router"] = tensors[f"{at}.gate.weight"]
        for name in ("gate", "up", "down"):
            block[name] = np.stack([tensors[f"{at}.experts.{n}.{name}_proj.weight"] for n in range(N_EXPERTS)])
            block[f"shared_{name}"] = tensors[f"{at}.shared_experts.{name}_proj.weight"]
    return block


DEEPSEEK_CONFIG: Json = {
    **LLAMA_CONFIG,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": EXPERT_WIDTH,
    "moe_layer_freq": 1,
    "n_routed_experts": N_EXPERTS,
    "n_shared_experts": 1,
    "norm_topk_prob": False,
    "num_experts_per_tok": 2,
    "scoring_func": "softmax",
    "seq_aux": True,
    "vocab_size": BPE,
}

MINICPM_SCALES = {"scale_emb": 3, "scale_depth": 1.4, "dim_model_base": 32}

CASES: Mapping[str, Case] = {
    "baichuan": case("BaichuanForCausalLM", BAICHUAN, "sentencepiece"),
    "baichuan-13b": case("BaichuanForCausalLM", BAICHUAN_13B, "sentencepiece"),
    "xverse": case(
        "XverseForCausalLM",
        Remote(
            {**without(LLAMA_CONFIG, "num_key_value_heads"), "vocab_size": BPE, "max_tokenizer_truncation": 256},
            Decoder(HEADS, HEADS),
            lambda i: llama_shapes(i, HEADS),
            llama_block,
            llama_ends,
            outside(BPE),
        ),
        "bpe",
    ),
    "orion": case(
        "OrionForCausalLM",
        Remote(
            {**LLAMA_CONFIG, "rms_norm_eps": 1e-5},
            Decoder(HEADS, HEADS_KV, layer_norm=True, eps=1e-5),
            orion_shapes,
            orion_block,
            orion_ends,
            {**outside(SPM), "model.norm.bias": (HIDDEN,)},
        ),
        "sentencepiece",
    ),
    "internlm2": case(
        "InternLM2ForCausalLM",
        Remote(
            {**LLAMA_CONFIG, "attn_implementation": "eager", "bias": False, "rope_theta": 1000000},
            Decoder(HEADS, HEADS_KV, theta=1000000.0),
            internlm_shapes,
            internlm_block,
            internlm_ends,
            {
                "model.tok_embeddings.weight": (SPM, HIDDEN),
                "model.norm.weight": (HIDDEN,),
                "output.weight": (SPM, HIDDEN),
            },
        ),
        "sentencepiece",
    ),
    "internlm3": case(
        "InternLM3ForCausalLM",
        Remote(
            {**LLAMA_CONFIG, "bias": False, "qkv_bias": False, "head_dim": HEAD_DIM},
            Decoder(HEADS, HEADS_KV),
            llama_shapes,
            llama_block,
            llama_ends,
            outside(SPM),
        ),
        "sentencepiece",
    ),
    "minicpm": case(
        "MiniCPMForCausalLM",
        Remote(
            {**LLAMA_CONFIG, **MINICPM_SCALES, "rms_norm_eps": 1e-5},
            Decoder(
                HEADS,
                HEADS_KV,
                eps=1e-5,
                embedding_scale=3,
                residual_scale=1.4 / LAYERS**0.5,
                logit_divisor=HIDDEN / 32,
            ),
            llama_shapes,
            llama_block,
            llama_ends,
            outside(SPM),
        ),
        "sentencepiece",
    ),
    "deepseek": case(
        "DeepseekForCausalLM",
        Remote(
            DEEPSEEK_CONFIG,
            Decoder(HEADS, HEADS_KV, experts_used=2),
            deepseek_shapes,
            deepseek_block,
            llama_ends,
            outside(BPE),
        ),
        "bpe",
    ),
}
