"""Cases of families whose code lies beside their checkpoints and whose tensors have names of their own."""

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
    PARTS,
    WIDTH,
    Arrays,
    Remote,
    case,
    llama_shapes,
)

# EXAONE 3: Llama under GPT-2's names

EXAONE_PARTS = {
    "norm": "ln_1.weight",
    "q": "attn.attention.q_proj.weight",
    "k": "attn.attention.k_proj.weight",
    "v": "attn.attention.v_proj.weight",
    "o": "attn.attention.out_proj.weight",
    "ffn_norm": "ln_2.weight",
    "gate": "mlp.c_fc_0.weight",
    "up": "mlp.c_fc_1.weight",
    "down": "mlp.c_proj.weight",
}


def exaone_shapes(i: int) -> dict[str, tuple[int, ...]]:
    sizes = llama_shapes(i)
    return {f"transformer.h.{i}.{name}": sizes[f"model.layers.{i}.{PARTS[p]}"] for p, name in EXAONE_PARTS.items()}


def exaone_block(tensors: Arrays, i: int) -> Block:
    return {part: tensors[f"transformer.h.{i}.{name}"] for part, name in EXAONE_PARTS.items()}


def exaone_ends(tensors: Arrays) -> tuple[NDArray[Any], Block]:
    embedding = tensors["transformer.wte.weight"]
    return embedding, {"norm": tensors["transformer.ln_f.weight"], "output": embedding}


EXAONE = Remote(
    {
        "model_type": "exaone",
        "activation_function": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS_KV,
        "num_layers": LAYERS,
        "head_dim": HEAD_DIM,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 256,
        "rope_theta": 1000000.0,
        "embed_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vocab_size": BPE,
    },
    Decoder(HEADS, HEADS_KV, theta=1000000.0, eps=1e-5),
    exaone_shapes,
    exaone_block,
    exaone_ends,
    {"transformer.wte.weight": (BPE, HIDDEN), "transformer.ln_f.weight": (HIDDEN,)},
)


# OLMo 1 as it came first: norms without weights, what is gated and its gate in one matrix


def olmo_shapes(i: int) -> dict[str, tuple[int, ...]]:
    sizes = {
        "att_proj": (3 * HIDDEN, HIDDEN),
        "attn_out": (HIDDEN, HIDDEN),
        "ff_proj": (2 * WIDTH, HIDDEN),
        "ff_out": (HIDDEN, WIDTH),
    }
    return {f"model.transformer.blocks.{i}.{name}.weight": size for name, size in sizes.items()}


def olmo_block(tensors: Arrays, i: int) -> Block:
    rows = {name.split(".")[-2]: tensors[name] for name in olmo_shapes(i)}
    q, k, v = np.split(rows["att_proj"], 3)
    up, gate = np.split(rows["ff_proj"], 2)
    matrices = {"q": q, "k": k, "v": v, "o": rows["attn_out"], "gate": gate, "up": up, "down": rows["ff_out"]}
    return {**matrices, "norm": np.ones(HIDDEN), "ffn_norm": np.ones(HIDDEN)}


def olmo_ends(tensors: Arrays) -> tuple[NDArray[Any], Block]:
    end = {"norm": np.ones(HIDDEN), "output": tensors["model.transformer.ff_out.weight"]}
    return tensors["model.transformer.wte.weight"], end


OLMO = Remote(
    {
        "model_type": "hf_olmo",
        "activation_type": "swiglu",
        "alibi": False,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_type": "sequential",
        "d_model": HIDDEN,
        "embedding_size": BPE,
        "flash_attention": True,
        "include_bias": False,
        "init_device": "meta",
        "layer_norm_type": "default",
        "layer_norm_with_affine": False,
        "max_sequence_length": 256,
        "mlp_hidden_size": 2 * WIDTH,
        "mlp_ratio": 4,
        "multi_query_attention": False,
        "n_heads": HEADS,
        "n_layers": LAYERS,
        "precision": "amp_bf16",
        "rope": True,
        "rope_full_precision": True,
        "scale_logits": False,
        "vocab_size": BPE,
        "weight_tying": False,
    },
    Decoder(HEADS, HEADS, layer_norm=True, eps=1e-5),
    olmo_shapes,
    olmo_block,
    olmo_ends,
    dict.fromkeys(("model.transformer.wte.weight", "model.transformer.ff_out.weight"), (BPE, HIDDEN)),
)


# Qwen 1: GPT-2's names, two matrices of half the stated width before the third


def qwen_shapes(i: int) -> dict[str, tuple[int, ...]]:
    at = f"transformer.h.{i}"
    return {
        f"{at}.ln_1.weight": (HIDDEN,),
        f"{at}.attn.c_attn.weight": (3 * HIDDEN, HIDDEN),
        f"{at}.attn.c_attn.bias": (3 * HIDDEN,),
        f"{at}.attn.c_proj.weight": (HIDDEN, HIDDEN),
        f"{at}.ln_2.weight": (HIDDEN,),
        f"{at}.mlp.w1.weight": (WIDTH, HIDDEN),
        f"{at}.mlp.w2.weight": (WIDTH, HIDDEN),
        f"{at}.mlp.c_proj.weight": (HIDDEN, WIDTH),
    }


def qwen_block(tensors: Arrays, i: int) -> Block:
    at = f"transformer.h.{i}"
    matrices, biases = (np.split(tensors[f"{at}.attn.c_attn.{kind}"], 3) for kind in ("weight", "bias"))
    packed = dict(zip("qkv", matrices, strict=True)) | {
        f"{part}_bias": bias for part, bias in zip("qkv", biases, strict=True)
    }
    return packed | {
        "norm": tensors[f"{at}.ln_1.weight"],
        "o": tensors[f"{at}.attn.c_proj.weight"],
        "ffn_norm": tensors[f"{at}.ln_2.weight"],
        "gate": tensors[f"{at}.mlp.w2.weight"],
        "up": tensors[f"{at}.mlp.w1.weight"],
        "down": tensors[f"{at}.mlp.c_proj.weight"],
    }


def qwen_ends(tensors: Arrays) -> tuple[NDArray[Any], Block]:
    end = {"norm": tensors["transformer.ln_f.weight"], "output": tensors["lm_head.weight"]}
    return tensors["transformer.wte.weight"], end


QWEN_CONFIG: Json = {
    "attn_dropout_prob": 0.0,
    "bf16": True,
    "emb_dropout_prob": 0.0,
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": 2 * WIDTH,
    "kv_channels": HEAD_DIM,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 256,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 256,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": BPE,
}


# ChatGLM 3: half a head turns, in pairs; one matrix for gate and up


def chatglm_shapes(i: int) -> dict[str, tuple[int, ...]]:
    at = f"transformer.encoder.layers.{i}"
    rows = (HEADS + 2 * HEADS_KV) * HEAD_DIM
    return {
        f"{at}.input_layernorm.weight": (HIDDEN,),
        f"{at}.self_attention.query_key_value.weight": (rows, HIDDEN),
        f"{at}.self_attention.query_key_value.bias": (rows,),
        f"{at}.self_attention.dense.weight": (HIDDEN, HIDDEN),
        f"{at}.post_attention_layernorm.weight": (HIDDEN,),
        f"{at}.mlp.dense_h_to_4h.weight": (2 * WIDTH, HIDDEN),
        f"{at}.mlp.dense_4h_to_h.weight": (HIDDEN, WIDTH),
    }


def chatglm_block(tensors: Arrays, i: int) -> Block:
    at = f"transformer.encoder.layers.{i}"
    ends = np.cumsum([HEADS * HEAD_DIM, HEADS_KV * HEAD_DIM])
    matrices, biases = (
        np.split(tensors[f"{at}.self_attention.query_key_value.{kind}"], ends) for kind in ("weight", "bias")
    )
    gate, up = np.split(tensors[f"{at}.mlp.dense_h_to_4h.weight"], 2)
    packed = dict(zip("qkv", matrices, strict=True)) | {
        f"{part}_bias": bias for part, bias in zip("qkv", biases, strict=True)
    }
    return packed | {
        "norm": tensors[f"{at}.input_layernorm.weight"],
        "o": tensors[f"{at}.self_attention.dense.weight"],
        "ffn_norm": tensors[f"{at}.post_attention_layernorm.weight"],
        "gate": gate,
        "up": up,
        "down": tensors[f"{at}.mlp.dense_4h_to_h.weight"],
    }


def chatglm_ends(tensors: Arrays) -> tuple[NDArray[Any], Block]:
    end = {
        "norm": tensors["transformer.encoder.final_layernorm.weight"],
        "output": tensors["transformer.output_layer.weight"],
    }
    return tensors["transformer.embedding.word_embeddings.weight"], end


CHATGLM_CONFIG: Json = {
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": WIDTH,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": HIDDEN,
    "kv_channels": HEAD_DIM,
    "layernorm_epsilon": 1e-5,
    "model_type": "chatglm",
    "multi_query_attention": True,
    "multi_query_group_num": HEADS_KV,
    "num_attention_heads": HEADS,
    "num_layers": LAYERS,
    "original_rope": True,
    "padded_vocab_size": BPE,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 256,
    "use_cache": True,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


CASES: Mapping[str, Case] = {
    "olmo-first": case("OLMoForCausalLM", OLMO, "bpe"),
    "exaone3": case("ExaoneForCausalLM", EXAONE, "bpe"),
    "qwen1": case(
        "QWenLMHeadModel",
        Remote(
            QWEN_CONFIG,
            Decoder(HEADS, HEADS),
            qwen_shapes,
            qwen_block,
            qwen_ends,
            {
                "transformer.wte.weight": (BPE, HIDDEN),
                "transformer.ln_f.weight": (HIDDEN,),
                "lm_head.weight": (BPE, HIDDEN),
            },
        ),
        "bpe",
    ),
    "chatglm3": case(
        "ChatGLMModel",
        Remote(
            CHATGLM_CONFIG,
            Decoder(HEADS, HEADS_KV, rope="pairs", rotary_dim=HEAD_DIM // 2, eps=1e-5),
            chatglm_shapes,
            chatglm_block,
            chatglm_ends,
            {
                "transformer.embedding.word_embeddings.weight": (BPE, HIDDEN),
                "transformer.encoder.final_layernorm.weight": (HIDDEN,),
                "transformer.output_layer.weight": (BPE, HIDDEN),
            },
        ),
        "bpe",
    ),
}
