"""A llama.cpp context and the tokens that its memory holds, kept in step with each other."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models import native
from models.errors import GenerationError, LoadError

BATCH = 512
"""Tokens computed at once, and so how often a long prompt looks whether it was cancelled."""


_LIBC = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)


class Cancelled(Exception):
    """The abort flag was up. The context is as it was before the call."""


class Context:
    """One sequence of tokens in a model's memory (the KV cache, or the state of a recurrent model).

    `held` is exactly what the memory holds, whatever fails on the way. Calls block and free the interpreter
    lock; only `abort` may be called from another thread. Owns its C object: call `close`.
    """

    def __init__(self, model: Any, *, n_ctx: int, threads: int) -> None:
        lib = native.library()
        self._lib = lib
        self.held: list[int] = []
        # A C function over a flag byte: strlen is 0 until the first byte is set. No Python runs in the callback,
        # so it needs no interpreter lock and has no exception to lose.
        self._flag = ctypes.create_string_buffer(2)
        self._abort_callback = ctypes.cast(_LIBC.strlen, lib.ggml_abort_callback)
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = BATCH
        params.n_outputs_max = 1  # only the last token's logits are ever asked for
        params.n_threads = params.n_threads_batch = threads
        params.swa_full = False
        params.no_perf = True
        params.abort_callback = self._abort_callback
        params.abort_callback_data = ctypes.cast(self._flag, ctypes.c_void_p)
        with native.capture_log() as log:
            self._context = lib.llama_init_from_model(model, params)
        self.log = log
        if not self._context:
            said = "; ".join(log.problems())
            raise LoadError(
                f"llama.cpp cannot make a context of {n_ctx} tokens: {said}",
                hint="a smaller --context needs less memory",
                n_ctx=n_ctx,
                log=tuple(log.tail(20)),
            )
        self._memory = lib.llama_get_memory(self._context)
        self._n_vocab: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self._n_swa: int = lib.llama_model_n_swa(model)
        self._is_recurrent: bool = lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(model)
        self.n_ctx = min(n_ctx, int(lib.llama_n_ctx(self._context)))  # llama.cpp rounds up

    def abort(self) -> None:
        """Make a running or the next `extend` raise Cancelled. From any thread."""
        self._flag[0] = b"\1"

    def clear_abort(self) -> None:
        self._flag[0] = b"\0"

    @property
    def abort_requested(self) -> bool:
        return self._flag[0] != b"\0"

    def reuse(self, tokens: Sequence[int]) -> int:
        """Cut the memory to what it shares with the beginning of `tokens`, and say how many tokens that is.

        At least one token is left to compute, since its logits are needed.
        """
        limit = min(len(self.held), len(tokens) - 1)
        common = 0
        while common < limit and self.held[common] == tokens[common]:
            common += 1
        self.truncate(common)
        return len(self.held)

    def truncate(self, n: int) -> None:
        """Keep the first `n` tokens where llama.cpp can provably do that, else none."""
        if n >= len(self.held):
            return
        if n > 0 and self._can_cut(n) and self._lib.llama_memory_seq_rm(self._memory, 0, n, -1):
            del self.held[n:]
        else:
            self.clear()

    def _can_cut(self, n: int) -> bool:
        if self._is_recurrent:
            return False
        if self._n_swa <= 0:
            return True
        # llama.cpp cuts a sliding window without a word even when the tokens that slid out would be needed.
        first: int = self._lib.llama_memory_seq_pos_min(self._memory, 0)
        return first == 0 or 0 <= first <= n - self._n_swa

    def clear(self) -> None:
        self._lib.llama_memory_clear(self._memory, True)
        self.held.clear()

    def extend(self, tokens: Sequence[int], progress: Callable[[int], None] = lambda done: None) -> None:
        """Compute `tokens` after those held. `progress` hears how many are done.

        Raises Cancelled and GenerationError; the tokens of whole batches before that stay held.
        """
        for start in range(0, len(tokens), BATCH):
            if self.abort_requested:
                raise Cancelled
            self._decode(tokens[start : start + BATCH])
            progress(min(start + BATCH, len(tokens)))

    def _decode(self, tokens: Sequence[int]) -> None:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        before = len(self.held)
        self.held.extend(tokens)
        try:
            with native.capture_log() as log:
                status = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(ids, len(tokens)))
        except BaseException:  # Ctrl-C in the calling thread, before or after the call
            del self.held[self._lib.llama_memory_seq_pos_max(self._memory, 0) + 1 :]
            raise
        if status == 0:
            return
        # What an interrupted batch left in the memory is unknown: cut it off, or drop everything.
        if before == 0:
            self.clear()
        else:
            self.truncate(before)
        if status == 2:
            raise Cancelled
        said = "; ".join(log.problems())
        raise GenerationError(
            f"llama.cpp failed to compute {len(tokens)} tokens (status {status}): {said}",
            status=status,
            log=tuple(log.tail(20)),
        )

    def check_logits(self) -> None:
        """Raise GenerationError when the last token's logits are no numbers: sampling from them would abort."""
        logits = np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, -1), shape=(self._n_vocab,))
        highest = logits.max()  # NaN anywhere makes it NaN
        if not np.isfinite(highest):
            self.clear()
            raise GenerationError(
                "the model computes no numbers (NaN or infinity)",
                hint="its file is damaged: fetch or convert it again",
            )

    @property
    def pointer(self) -> Any:
        """The `llama_context *`."""
        return self._context

    def close(self) -> None:
        context, self._context = self._context, None
        if context:
            self._lib.llama_free(context)
