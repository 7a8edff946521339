"""Cases of families whose code lies beside their checkpoints: written here, and computed by `numpy_decoder`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints import Json, write_json, write_shards
from tests.family_checkpoints import VOCABULARY, Case, Tokenizer
from tests.numpy_decoder import Block, Decoder, logits

Arrays = dict[str, NDArray[Any]]
HIDDEN, WIDTH, HEADS, HEADS_KV, LAYERS, HEAD_DIM = 64, 128, 4, 2, 3, 16


@dataclass(frozen=True)
class Remote:
    """A family: its config, its tensors by name, and which of them make a block of the reference.

    shapes   tensors of a block, with {i} for its number, and those outside
    block    tensors by name, number -> the reference's block
    ends     tensors by name -> embedding, and the reference's end
    """

    config: Json
    decoder: Decoder
    shapes: Callable[[int], Mapping[str, tuple[int, ...]]]
    block: Callable[[Arrays, int], Block]
    ends: Callable[[Arrays], tuple[NDArray[Any], Block]]
    outside: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    layers: int = LAYERS


def _tensors(remote: Remote) -> Arrays:
    shapes: dict[str, tuple[int, ...]] = dict(remote.outside)
    for i in range(remote.layers):
        shapes |= remote.shapes(i)
    random = np.random.default_rng(3)
    arrays = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        is_norm = len(shape) == 1 and not name.endswith("bias")
        arrays[name] = values * 0.2 + 1 if is_norm else values * (0.3 if len(shape) == 1 else 0.12)
        arrays[name] = arrays[name].astype(np.float32)
    return arrays


def case(architecture: str, remote: Remote, tokenizer: Tokenizer) -> Case:
    def write(folder: Path) -> None:
        fields = {"architectures": [architecture], "torch_dtype": "float32"}
        write_json(folder / "config.json", fields | remote.config)
        write_shards(folder, _tensors(remote), 3)

    def compute(folder: Path, ids: Sequence[int]) -> NDArray[np.float32]:
        tensors = _tensors(remote)
        embedding, end = remote.ends(tensors)
        return logits(remote.decoder, ids, embedding, [remote.block(tensors, i) for i in range(remote.layers)], end)

    return Case(architecture, tokenizer=tokenizer, dtype="float32", write=write, logits=compute)


# Llama's names, which most share

_PARTS = {
    "norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


def llama_shapes(i: int, heads_kv: int = HEADS_KV) -> dict[str, tuple[int, ...]]:
    at = f"model.layers.{i}"
    kv = heads_kv * HEAD_DIM
    sizes = {
        "norm": (HIDDEN,),
        "q": (HIDDEN, HIDDEN),
        "k": (kv, HIDDEN),
        "v": (kv, HIDDEN),
        "o": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "gate": (WIDTH, HIDDEN),
        "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
    }
    return {f"{at}.{_PARTS[part]}": size for part, size in sizes.items()}


def llama_block(tensors: Arrays, i: int) -> Block:
    at = f"model.layers.{i}"
    return {part: tensors[f"{at}.{name}"] for part, name in _PARTS.items() if f"{at}.{name}" in tensors}


def llama_ends(tensors: Arrays) -> tuple[NDArray[Any], Block]:
    end = {"norm": tensors["model.norm.weight"], "output": tensors["lm_head.weight"]}
    return tensors["model.embed_tokens.weight"], end


def outside(n_vocab: int) -> dict[str, tuple[int, ...]]:
    return {
        "model.embed_tokens.weight": (n_vocab, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (n_vocab, HIDDEN),
    }


SPM = VOCABULARY["sentencepiece"]
BPE = VOCABULARY["bpe"]
LLAMA_CONFIG: Json = {
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS_KV,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": SPM,
}


# EXAONE 3: Llama under GPT-2's names

_EXAONE_PARTS = {
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
    return {f"transformer.h.{i}.{name}": sizes[f"model.layers.{i}.{_PARTS[p]}"] for p, name in _EXAONE_PARTS.items()}


def exaone_block(tensors: Arrays, i: int) -> Block:
    return {part: tensors[f"transformer.h.{i}.{name}"] for part, name in _EXAONE_PARTS.items()}


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
        "vocab_size": VOCABULARY["bpe"],
    },
    Decoder(HEADS, HEADS_KV, theta=1000000.0, eps=1e-5),
    exaone_shapes,
    exaone_block,
    exaone_ends,
    {"transformer.wte.weight": (VOCABULARY["bpe"], HIDDEN), "transformer.ln_f.weight": (HIDDEN,)},
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
        "embedding_size": VOCABULARY["bpe"],
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
        "vocab_size": VOCABULARY["bpe"],
        "weight_tying": False,
    },
    Decoder(HEADS, HEADS, layer_norm=True, eps=1e-5),
    olmo_shapes,
    olmo_block,
    olmo_ends,
    dict.fromkeys(("model.transformer.wte.weight", "model.transformer.ff_out.weight"), (VOCABULARY["bpe"], HIDDEN)),
)


# Baichuan: queries, keys and values in one matrix


def _without(config: Json, *names: str) -> Json:
    return {name: value for name, value in config.items() if name not in names}


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
    **_without(LLAMA_CONFIG, "num_key_value_heads", "max_position_embeddings"),
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
    biases = {f"model.layers.{i}.{_PARTS[part]}".replace("weight", "bias"): (HIDDEN,) for part in ORION_NORMS}
    return llama_shapes(i) | biases


def orion_block(tensors: Arrays, i: int) -> Block:
    named = {f"{part}_bias": f"model.layers.{i}.{_PARTS[part]}".replace("weight", "bias") for part in ORION_NORMS}
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
    "olmo-first": case("OLMoForCausalLM", OLMO, "bpe"),
    "exaone3": case("ExaoneForCausalLM", EXAONE, "bpe"),
    "baichuan": case("BaichuanForCausalLM", BAICHUAN, "sentencepiece"),
    "baichuan-13b": case("BaichuanForCausalLM", BAICHUAN_13B, "sentencepiece"),
    "xverse": case(
        "XverseForCausalLM",
        Remote(
            {**_without(LLAMA_CONFIG, "num_key_value_heads"), "vocab_size": BPE, "max_tokenizer_truncation": 256},
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
