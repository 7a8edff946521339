"""Drafting by a model's own head for the token after the next (MTP), where it has one and llama.cpp computes it.

The head is one more layer. It is given a token and what the model computed of the token before (its hidden state), and
tells the next one but one; what it computes itself it is given again, for the tokens after that. So it must follow
everything that the model computes. llama.cpp's calls for this are C++ of a staging header (src/llama-ext.h), which
its own common/speculative.cpp uses in the same way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import native
from models.errors import LoadError
from models.gguf_file import GgufFile
from runner.engine.context import Context, fill_batch
from runner.engine.context_params import ContextOptions, context_params
from runner.engine.draft_model import PRIORS, guess_on
from runner.engine.speculation import Draft

_ARCHITECTURES = ("qwen35", "qwen35moe", "glm4moe")
"""Those whose head was tried here; some others end the process."""
_SET = "_Z26llama_set_embeddings_nextnP13llama_contextbb"
_ALL = "_Z26llama_get_embeddings_nextnP13llama_context"
_ONE = "_Z30llama_get_embeddings_nextn_ithP13llama_contexti"

Rows = NDArray[np.float32]


def has_prediction_head(gguf: GgufFile) -> bool:
    """Whether a file holds one head of a kind that is known to work, and this build has the calls for it."""
    arch = gguf.architecture
    return (
        arch in _ARCHITECTURES
        and gguf.integer(f"{arch}.nextn_predict_layers") == 1
        and any(tensor.name.endswith(".nextn.eh_proj.weight") for tensor in gguf.tensors)
        and all(hasattr(native.library()._lib, name) for name in (_SET, _ALL, _ONE))
    )


class PredictionHead:
    """The head of the model that `target` computes. Raises LoadError. Owns its C objects: call `close`."""

    priors = PRIORS

    def __init__(self, model: Any, target: Context, options: ContextOptions) -> None:
        lib, staging = native.library(), native.library()._lib
        self._lib, self._target = lib, target
        self._all, self._one, set_output = (getattr(staging, name) for name in (_ALL, _ONE, _SET))
        self._all.restype = self._one.restype = ctypes.POINTER(ctypes.c_float)
        self._all.argtypes, self._one.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int32]
        set_output.restype, set_output.argtypes = None, [ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool]
        self.seconds_each = 0.0
        self._tokens: list[int] = []
        self._width: int = lib.llama_model_n_embd(model)
        self._first, self._rows = 0, np.empty((0, self._width), np.float32)
        """Hidden states of the last batch, and the position of the first."""
        params = context_params(replace(options, rollback=0))
        params.ctx_type = lib.LLAMA_CONTEXT_TYPE_MTP
        with native.capture_log() as log:
            self._context = lib.llama_init_from_model(model, params)
        if not self._context:
            raise LoadError(f"llama.cpp cannot use the model's own head: {'; '.join(log.problems())}")
        self._memory = lib.llama_get_memory(self._context)
        self._batch = lib.llama_batch_init(options.batch, 0, 1)
        self._given = np.zeros((options.batch, self._width), np.float32)
        self._batch.embd = self._given.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        set_output(target.pointer, True, False)  # of every token
        set_output(self._context, True, True)  # of the one that has logits
        target.follower = self

    # What the model computes

    def follow(self, tokens: Sequence[int], position: int) -> None:
        """The model has computed `tokens`, the first of them at `position`."""
        rows = np.ctypeslib.as_array(self._all(self._target.pointer), shape=(len(tokens), self._width)).copy()
        before = self._hidden(position - 1)
        given = np.concatenate((np.zeros((1, self._width), np.float32) if before is None else before[None], rows[:-1]))
        if self._end() < position:  # what comes between was taken from elsewhere
            self.forget()
        if not self._compute(tokens, position, given, logits=False):
            self.forget()
        self._first, self._rows = position, rows

    def forget(self) -> None:
        """What was computed is another text now."""
        self._lib.llama_memory_clear(self._memory, True)
        self._rows = self._rows[:0]

    def _hidden(self, position: int) -> Rows | None:
        at = position - self._first
        return self._rows[at] if 0 <= at < len(self._rows) else None

    def _end(self) -> int:
        return int(self._lib.llama_memory_seq_pos_max(self._memory, 0)) + 1

    # Guessing

    def begin(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)

    def add(self, token: int) -> None:
        self._tokens.append(token)

    def draft(self, most: int) -> Draft:
        position = len(self._tokens) - 1
        most = min(most, self._target.n_ctx - position - 1)
        hidden = self._hidden(position - 1)
        if most < 1 or hidden is None or not self._compute(self._tokens[-1:], position, hidden[None], logits=True):
            return Draft()

        def compute(token: int) -> None:
            nonlocal position
            position += 1
            hidden = np.ctypeslib.as_array(self._one(self._context, 0), shape=(1, self._width)).copy()
            if not self._compute([token], position, hidden, logits=True):
                raise LoadError("llama.cpp cannot go on with the model's own head")

        draft, self.seconds_each = guess_on(lambda tokens: self._logits(), compute, most, self.seconds_each)
        return draft

    def _compute(self, tokens: Sequence[int], position: int, given: Rows, *, logits: bool) -> bool:
        """In place of what is held from `position` on. With `logits` of the last token."""
        self._lib.llama_memory_seq_rm(self._memory, 0, position, -1)
        n = len(tokens)
        self._given[:n] = given
        batch = fill_batch(self._batch, tokens, position, logits_from=n - 1 if logits else n)
        with native.capture_log():
            return bool(self._lib.llama_decode(self._context, batch) == 0)

    def _logits(self) -> Rows:
        pointer = self._lib.llama_get_logits_ith(self._context, 0)
        return np.ctypeslib.as_array(pointer, shape=(self._target.n_vocab,))

    def close(self) -> None:
        context, self._context = self._context, None
        if context:
            self._batch.embd = None  # that is numpy's
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(context)
