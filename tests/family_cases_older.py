"""Cases of the GPT-2 line and its contemporaries: layer norms, learned positions, ALiBi, parallel layers."""

from __future__ import annotations

from collections.abc import Mapping

from tests.family_cases_dense import partial
from tests.family_checkpoints import Case

CASES: Mapping[str, Case] = {
    "gpt2": Case("GPT2LMHeadModel", edit=lambda config: config.update(n_ctx=256)),
    "gpt2-transformers-5": Case("GPT2LMHeadModel"),
    "gpt-neox": Case("GPTNeoXForCausalLM", {"rope_parameters": partial(0.25)}),
    "gpt-neox-serial": Case("GPTNeoXForCausalLM", {"rope_parameters": partial(1.0), "use_parallel_residual": False}),
    "gpt-neox-transformers-4": Case(
        "GPTNeoXForCausalLM",
        {"rope_parameters": partial(0.25)},
        edit=lambda config: config.update(rope_parameters=None, rotary_pct=0.25, rotary_emb_base=10000),
    ),
    "gpt-bigcode": Case("GPTBigCodeForCausalLM"),
    "mpt": Case(
        "MPTForCausalLM",
        {"max_seq_len": 256, "expansion_ratio": 2, "attn_config": {"alibi": True, "clip_qkv": 0.5}},
        model_class="MptForCausalLM",
    ),
    "bloom": Case("BloomForCausalLM"),
    "falcon-7b": Case(
        "FalconForCausalLM",
        {"multi_query": True, "parallel_attn": True},
        edit=lambda config: config.pop("num_kv_heads"),
    ),
    "falcon-40b": Case("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}, seed=2),
}
