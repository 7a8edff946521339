"""Variants of the families whose code lies beside their checkpoints, as the hub has them: `family_cases_remote`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests import family_cases_remote as remote
from tests import family_cases_renamed as renamed
from tests import remote_family
from tests.family_cases_dense import longrope
from tests.family_checkpoints import Case, Refusal
from tests.numpy_decoder import Block, Decoder
from tests.remote_family import BPE, HEAD_DIM, HEADS, HIDDEN, LAYERS, SPM, Arrays, Remote, case

# MPT: GPT-2's network, keys and values shared by groups, or learned positions and biases

MPT_KV = 2
_MPT = {
    "norm": "norm_1",
    "qkv": "attn.Wqkv",
    "o": "attn.out_proj",
    "ffn_norm": "norm_2",
    "up": "ffn.up_proj",
    "down": "ffn.down_proj",
}


def mpt_shapes(i: int, heads_kv: int, *, biases: bool) -> dict[str, tuple[int, ...]]:
    rows = (HEADS + 2 * heads_kv) * HEAD_DIM
    sizes: dict[str, tuple[int, ...]] = {
        "norm": (HIDDEN,),
        "qkv": (rows, HIDDEN),
        "o": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "up": (4 * HIDDEN, HIDDEN),
        "down": (HIDDEN, 4 * HIDDEN),
    }
    at = f"transformer.blocks.{i}"
    shapes = {f"{at}.{_MPT[part]}.weight": size for part, size in sizes.items()}
    return shapes | ({f"{at}.{_MPT[part]}.bias": size[:1] for part, size in sizes.items()} if biases else {})


def mpt_block(tensors: Arrays, i: int, heads_kv: int) -> Block:
    ends = np.cumsum([HEADS * HEAD_DIM, heads_kv * HEAD_DIM])
    block: Arrays = {}
    for part, name in _MPT.items():
        for kind, behind in (("weight", ""), ("bias", "_bias")):
            tensor = tensors.get(f"transformer.blocks.{i}.{name}.{kind}")
            if tensor is None:
                continue
            if part == "qkv":
                block |= {f"{one}{behind}": rows for one, rows in zip("qkv", np.split(tensor, ends), strict=True)}
            else:
                block[part + behind] = tensor
    return block


def mpt_ends(tensors: Arrays) -> tuple[NDArray[Any], Block]:
    embedding = tensors["transformer.wte.weight"]
    end = {"norm": tensors["transformer.norm_f.weight"], "output": embedding}
    if "transformer.wpe.weight" in tensors:
        end |= {"positions": tensors["transformer.wpe.weight"], "norm_bias": tensors["transformer.norm_f.bias"]}
    return embedding, end


def mpt(heads_kv: int, decoder: Decoder, attention: dict[str, Any], *, biases: bool = False) -> Case:
    outside: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (BPE, HIDDEN),
        "transformer.norm_f.weight": (HIDDEN,),
    }
    if biases:
        outside |= {"transformer.norm_f.bias": (HIDDEN,), "transformer.wpe.weight": (256, HIDDEN)}
    config = {
        "attn_config": {"attn_impl": "flash", "attn_pdrop": 0, "qk_ln": False, "rope": False, **attention},
        "d_model": HIDDEN,
        "emb_pdrop": 0.0,
        "expansion_ratio": 4,
        "init_device": "cpu",
        "learned_pos_emb": True,
        "logit_scale": None,
        "max_seq_len": 256,
        "model_type": "mpt",
        "n_heads": HEADS,
        "n_layers": LAYERS,
        "no_bias": not biases,
        "norm_type": "low_precision_layernorm",
        "resid_pdrop": 0.0,
        "tie_word_embeddings": True,
        "vocab_size": BPE,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return case(
        "MPTForCausalLM",
        Remote(
            config,
            decoder,
            lambda i: mpt_shapes(i, heads_kv, biases=biases),
            lambda tensors, i: mpt_block(tensors, i, heads_kv),
            mpt_ends,
            outside,
        ),
        "bpe",
    )


# GLM-4-9B: the code of ChatGLM 3 with another base frequency

GLM_4 = {
    **renamed.CHATGLM_CONFIG,
    "classifier_dropout": None,
    "fp32_residual_connection": False,
    "layernorm_epsilon": 1.5625e-07,
    "num_hidden_layers": LAYERS,
    "rope_ratio": 500,
    "vocab_size": BPE,
}


def minicpm(*, original: int, scale: float) -> Case:
    """Scaled for long texts, of which ours is one when it was trained with `original` tokens."""
    rope = longrope(HEAD_DIM // 2)
    del rope["rope_theta"], rope["factor"]
    factors = rope["long_factor" if original < 256 else "short_factor"]
    config = {
        **remote_family.LLAMA_CONFIG,
        **remote.MINICPM_SCALES,
        "rope_scaling": {**rope, "original_max_position_embeddings": original},
        "mup_denominator": 32,
        "sparse_config": {"dense_len": 8192, "kernel_size": 32, "topk": 64},
        "use_cache": True,
    }
    del config["tie_word_embeddings"]
    decoder = Decoder(
        HEADS,
        remote_family.HEADS_KV,
        factors=factors,
        rope_scale=scale,
        embedding_scale=3,
        residual_scale=1.4 / LAYERS**0.5,
        logit_divisor=HIDDEN / 32,
    )

    def ends(tensors: Arrays) -> tuple[NDArray[Any], Block]:
        embedding = tensors["model.embed_tokens.weight"]
        return embedding, {"norm": tensors["model.norm.weight"], "output": embedding}

    outside = {name: size for name, size in remote_family.outside(SPM).items() if "lm_head" not in name}
    one = Remote(config, decoder, remote_family.llama_shapes, remote_family.llama_block, ends, outside)
    return case("MiniCPMForCausalLM", one, "sentencepiece")


_LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 24,  # other than the hidden size by heads
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}


def uneven(model: Any) -> None:
    """Attention that tells tokens apart, so that the rotation shows in the logits."""
    for name, parameter in model.named_parameters():
        if ".q_b_proj." in name or ".kv_a_proj_with_mqa." in name:
            parameter.mul_(4)


CASES: Mapping[str, Case] = {
    "baichuan-7b-hub": case(
        "BaiChuanForCausalLM",
        replace(
            remote.BAICHUAN,
            config={
                **{name: value for name, value in remote.BAICHUAN.config.items() if name != "model_max_length"},
                "max_position_embeddings": 256,
                "model_type": "baichuan",
            },
        ),
        "sentencepiece",
    ),
    "internlm2-hub": case(
        "InternLM2ForCausalLM",
        Remote(
            {
                **remote_family.LLAMA_CONFIG,
                "attn_implementation": "eager",
                "bias": False,
                "rope_scaling": {"type": "dynamic", "factor": 2.0},
            },
            Decoder(HEADS, remote_family.HEADS_KV),
            remote.internlm_shapes,
            remote.internlm_block,
            remote.internlm_ends,
            {
                "model.tok_embeddings.weight": (SPM, HIDDEN),
                "model.norm.weight": (HIDDEN,),
                "output.weight": (SPM, HIDDEN),
            },
        ),
        "sentencepiece",
    ),
    "internlm3-biases": Case(
        "InternLM3ForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
        tokenizer="sentencepiece",
        model_class="LlamaForCausalLM",
        edit=lambda config: config.update(qkv_bias=True, bias=True, model_type="internlm3"),
    ),
    "minicpm-longrope": minicpm(original=256, scale=1.0),
    "minicpm-stretched": minicpm(original=64, scale=math.sqrt(1 + math.log(4) / math.log(64))),
    "minicpm3-longrope": Case(
        "MiniCPM3ForCausalLM",
        {**_LATENT, "rope_parameters": longrope(12) | {"original_max_position_embeddings": 256, "factor": None}},
        tokenizer="sentencepiece",
        edit=lambda config: config.pop("head_dim", None),
        adjust=uneven,
    ),
    "minicpm3-stretched": Case(
        "MiniCPM3ForCausalLM",
        {**_LATENT, "rope_parameters": longrope(12, factor=16.0)},  # which counts, not the ratio of the contexts
        tokenizer="sentencepiece",
        adjust=uneven,
    ),
    "glm-4-9b": case(
        "ChatGLMForConditionalGeneration",
        Remote(
            GLM_4,
            Decoder(HEADS, remote_family.HEADS_KV, rope="pairs", rotary_dim=HEAD_DIM // 2, theta=5e6, eps=1.5625e-07),
            renamed.chatglm_shapes,
            renamed.chatglm_block,
            renamed.chatglm_ends,
            {
                "transformer.embedding.word_embeddings.weight": (BPE, HIDDEN),
                "transformer.encoder.final_layernorm.weight": (HIDDEN,),
                "transformer.output_layer.weight": (BPE, HIDDEN),
                "transformer.rotary_pos_emb.inv_freq": (HEAD_DIM // 4,),
            },
        ),
        "glm",
    ),
    "mpt-groups": mpt(
        MPT_KV,
        Decoder(HEADS, MPT_KV, rope="none", alibi=16.0, clip=1.5, layer_norm=True, eps=1e-5),
        {
            "alibi": True,
            "alibi_bias_max": 16,
            "attn_type": "grouped_query_attention",
            "clip_qkv": 1.5,
            "kv_n_heads": MPT_KV,
        },
    ),
    "mpt-multi-query": mpt(
        1,
        Decoder(HEADS, 1, rope="none", alibi=8.0, layer_norm=True, eps=1e-5),
        {"alibi": True, "alibi_bias_max": 8, "attn_type": "multiquery_attention", "clip_qkv": None},
    ),
    "mpt-positions": mpt(
        HEADS,
        Decoder(HEADS, HEADS, rope="none", layer_norm=True, eps=1e-5),
        {"alibi": False, "alibi_bias_max": 8, "attn_type": "multihead_attention", "clip_qkv": None},
        biases=True,
    ),
}

REFUSED: Mapping[str, Refusal] = {
    "minicpm3-other-scale": Refusal(
        Case("MiniCPM3ForCausalLM", {**_LATENT, "scale_emb": 10}, tokenizer="sentencepiece"), "scale_emb"
    ),
    "mpt-norms": Refusal(mpt(HEADS, Decoder(HEADS, HEADS), {"qk_gn": True}), "attn_config"),
    "baichuan-few-layers": Refusal(
        case(
            "BaichuanForCausalLM",
            replace(remote.BAICHUAN, config={**remote.BAICHUAN.config, "num_hidden_layers": 3}, layers=3),
            "sentencepiece",
        ),
        "num_hidden_layers",
    ),
}
"""What llama.cpp's graphs do not compute."""
