"""What a context of llama.cpp is made with: all that decides how much memory it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models import native

BATCH = 512
"""Tokens computed at once, and so how often a long prompt looks whether it was cancelled; tuning may find better."""
MOST_OUTPUTS = 17
"""Tokens at most whose logits are asked for at once: one, and those drafted after it."""


@dataclass(frozen=True)
class ContextOptions:
    """`n_ctx` in tokens. The types are those of ggml (`GGML_TYPE_F16`)."""

    n_ctx: int
    threads: int
    batch_threads: int
    batch: int = BATCH
    flash_attention: bool | None = None
    """None: where llama.cpp finds that it can."""
    type_k: int = 1
    type_v: int = 1
    whole_window: bool = False
    """Keep every token in the layers that look back a window only."""
    rollback: int = 0
    """Of a state that each token overwrites, copies for so many tokens back, where llama.cpp can keep them."""


def context_params(options: ContextOptions) -> Any:
    """`llama_context_params` of a context that `options` describe: all that decides how much memory it takes."""
    params = native.library().llama_context_default_params()
    params.n_ctx = options.n_ctx
    params.n_batch = params.n_ubatch = options.batch
    params.n_outputs_max = MOST_OUTPUTS
    params.n_threads, params.n_threads_batch = options.threads, options.batch_threads
    params.type_k, params.type_v = options.type_k, options.type_v
    if options.flash_attention is not None:
        params.flash_attn_type = int(options.flash_attention)  # llama_flash_attn_type: 0 disabled, 1 enabled
    params.swa_full = options.whole_window
    params.n_rs_seq = options.rollback
    params.no_perf = True
    return params
