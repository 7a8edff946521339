"""A llama.cpp context and the tokens that its memory holds, kept in step with each other.

What a model computed of a token can be taken back again in three degrees (`Memory`). Where it cannot be cut at any
token, the part that is overwritten is copied at chosen tokens (`Checkpoint`), and a cut goes back to one of these.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from enum import Enum
from math import inf
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models import native
from models.errors import GenerationError, LoadError
from models.isolated import announce
from runner.engine.context_params import MOST_OUTPUTS, ContextOptions, context_params
from runner.engine.signals import aborting
from runner.engine.snapshots import Checkpoint, Snapshot, State
from runner.engine.text_stream import shared_prefix

CHECKPOINT_BYTES = 512 << 20
"""What all checkpoints of a context may take; beyond that the oldest but the first goes."""
_SHORT_SECONDS = 0.05

_LIBC = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
_WHOLE, _PARTIAL = 0, 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY


class Follower(Protocol):
    """Something that has to see all that a context computes."""

    def follow(self, tokens: Sequence[int], position: int) -> None:
        """`tokens` were computed, the first of them at `position`."""
        ...

    def forget(self) -> None:
        """What was computed before is gone, or has another place."""
        ...


class Cancelled(Exception):
    """The abort flag was up. `Context.held` is what the memory holds now."""


class Memory(Enum):
    """How far back a memory can be cut."""

    CUTTABLE = "every token has cells of its own: to any token"
    WINDOW = "some layers keep the last tokens only: while none is missing that would be looked at again"
    STATE = "a state that each token overwrites: not at all, but for tokens on trial"


class Context:
    """One sequence of tokens in a model's memory (the KV cache, or the state of a recurrent model).

    `held` is exactly what the memory holds, whatever fails on the way. Calls block and free the interpreter
    lock; only `abort` may be called from another thread. Owns its C object: call `close`.
    """

    def __init__(self, model: Any, options: ContextOptions) -> None:
        lib = native.library()
        self._lib = lib
        self.held: list[int] = []
        self.follower: Follower | None = None
        self.threads, self.batch = options.threads, options.batch
        self._checkpoints: list[Checkpoint] = []
        self._rows: dict[int, NDArray[np.float32]] = {}
        # A C function over a flag byte: strlen is 0 until the first byte is set. No Python runs in the callback,
        # so it needs no interpreter lock and has no exception to lose.
        self._flag = ctypes.create_string_buffer(2)
        self._stop = False
        self._interruptible = True
        self._advance_seconds = inf
        """What the last call of `advance` took."""
        self._abort_callback = ctypes.cast(_LIBC.strlen, lib.ggml_abort_callback)
        params = context_params(options)
        params.abort_callback = self._abort_callback
        params.abort_callback_data = ctypes.cast(self._flag, ctypes.c_void_p)
        with native.capture_log() as log:
            self._context = lib.llama_init_from_model(model, params)
        self.log = log
        if not self._context:
            said = "; ".join(log.problems())
            raise LoadError(
                f"llama.cpp cannot make a context of {options.n_ctx} tokens: {said}",
                hint="a smaller --context needs less memory",
                n_ctx=options.n_ctx,
                log=tuple(log.tail(20)),
            )
        self._batch = lib.llama_batch_init(MOST_OUTPUTS, 0, 1)
        self._memory = lib.llama_get_memory(self._context)
        self.n_vocab: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self._n_swa: int = 0 if options.whole_window else max(lib.llama_model_n_swa(model), 0)
        if lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(model):
            self.memory = Memory.STATE
        else:
            self.memory = Memory.WINDOW if self._n_swa else Memory.CUTTABLE
        self.most_drafted = MOST_OUTPUTS - 1
        """Tokens at most that may be computed on trial, and taken back at once."""
        if self.memory is Memory.STATE:
            # beside a window llama.cpp takes the state back, and not what slid out of the window
            rollback = 0 if self._n_swa else int(lib.llama_n_rs_seq(self._context))
            self.most_drafted = min(self.most_drafted, rollback)
        self._on_trial = 0
        self.n_ctx = min(options.n_ctx, int(lib.llama_n_ctx(self._context)))  # llama.cpp rounds up

    # Stopping

    def abort(self) -> None:
        """Make a running or the next `extend` raise Cancelled. From any thread."""
        self._stop = True
        if self._interruptible:
            self._flag[0] = b"\1"

    def clear_abort(self) -> None:
        self._stop = False
        self._flag[0] = b"\0"

    @property
    def abort_requested(self) -> bool:
        return self._stop

    # Cutting

    def reuse(self, tokens: Sequence[int]) -> int:
        """Cut the memory to what it shares with the beginning of `tokens`, and say how many tokens that is.

        At least one token is left to compute, since its logits are needed.
        """
        self.truncate(self.keepable(tokens))
        return len(self.held)

    def keepable(self, tokens: Sequence[int]) -> int:
        """How many of the first tokens `reuse` would keep."""
        return self._keepable(self.held, self._first(), self._checkpoints, tokens)

    def keepable_of(self, snapshot: Snapshot, tokens: Sequence[int]) -> int:
        """The same for a memory that was saved, once it is restored."""
        return self._keepable(snapshot.tokens, snapshot.first, snapshot.checkpoints, tokens)

    def _keepable(
        self, held: Sequence[int], first: int, checkpoints: Sequence[Checkpoint], tokens: Sequence[int]
    ) -> int:
        shared = min(shared_prefix(held, tokens), len(tokens) - 1)
        if shared == len(held) or self._can_cut(first, shared):
            return shared
        return max((point.n for point in checkpoints if point.n <= shared), default=0)

    def truncate(self, n: int) -> None:
        """Keep the first `n` tokens, or, where the memory cannot be cut there, as many as a checkpoint holds."""
        if n >= len(self.held):
            return
        # Copies of a state are those of the last batch, and good for one step back.
        on_trial = len(self.held) - n <= self._on_trial
        self._on_trial = 0
        if n > 0 and (on_trial or self._can_cut(self._first(), n)) and self._remove_from(n):
            self._settle(n)
            return
        for point in sorted(self._checkpoints, key=lambda point: -point.n):
            if point.n <= n and self._restore_part(point):
                self._settle(point.n)
                return
        self.clear()

    def _settle(self, n: int) -> None:
        del self.held[n:]
        self._checkpoints = [point for point in self._checkpoints if point.n <= n]

    def _can_cut(self, first: int, n: int) -> bool:
        # llama.cpp cuts a sliding window without a word even when the tokens that slid out would be needed.
        return self.memory is Memory.CUTTABLE or (
            self.memory is Memory.WINDOW and n > 0 and (first == 0 or 0 <= first <= n - self._n_swa)
        )

    def _first(self) -> int:
        return int(self._lib.llama_memory_seq_pos_min(self._memory, 0)) if self._n_swa else 0

    def _remove_from(self, n: int) -> bool:
        return bool(self._lib.llama_memory_seq_rm(self._memory, 0, n, -1))

    def shift(self, start: int, n: int) -> bool:
        """Take `n` tokens out from `start` on, and move those after them there; False where the memory cannot.

        What was computed of the tokens that move stays as it is, though they have seen those that go.
        """
        end = start + n
        if self.memory is not Memory.CUTTABLE or n < 1 or not self._lib.llama_memory_can_shift(self._memory):
            return False
        if not self._lib.llama_memory_seq_rm(self._memory, 0, start, end):
            return False
        self._lib.llama_memory_seq_add(self._memory, 0, end, -1, -n)
        del self.held[start:end]
        self._forget()
        return True

    def clear(self) -> None:
        self._lib.llama_memory_clear(self._memory, True)
        self._on_trial = 0
        self._forget()
        self.held.clear()
        self._checkpoints.clear()

    def _forget(self) -> None:
        if self.follower is not None:
            self.follower.forget()

    # Keeping

    @property
    def needs_checkpoints(self) -> bool:
        """Whether `marks` given to `extend` are of use."""
        return self.memory is not Memory.CUTTABLE

    def checkpoint(self) -> None:
        """Make a later cut to just here possible."""
        n = len(self.held)
        if not self.needs_checkpoints or not n or any(point.n == n for point in self._checkpoints):
            return
        if (data := self._state(_PARTIAL)) is None:
            return
        self._checkpoints.append(Checkpoint(n, data))
        while len(self._checkpoints) > 2 and sum(p.data.nbytes for p in self._checkpoints) > CHECKPOINT_BYTES:
            del self._checkpoints[1]  # the first one is that of the system prompt

    def _restore_part(self, point: Checkpoint) -> bool:
        if self.memory is Memory.STATE and self._n_swa:
            first = self._first()
            if not (first == 0 or 0 <= first <= point.n - self._n_swa):
                return False  # llama_memory_hybrid_iswa keeps its window out of a partial state
        return self._set_state(point.data, _PARTIAL) and self._remove_from(point.n) and self._ends_at(point.n)

    def snapshot_bytes(self) -> int:
        """What `snapshot` would take."""
        checkpoints = sum(point.data.nbytes for point in self._checkpoints)
        return int(self._lib.llama_state_seq_get_size_ext(self._context, 0, _WHOLE)) + checkpoints

    def snapshot(self) -> Snapshot | None:
        """A copy of the whole memory; None where llama.cpp does not give it."""
        if not self.held or (data := self._state(_WHOLE)) is None:
            return None
        return Snapshot(tuple(self.held), self._first(), data, tuple(self._checkpoints))

    def restore(self, snapshot: Snapshot) -> bool:
        """Put a copy in place of what is held. Where that fails nothing is held, and the answer is False."""
        self.clear()
        n = len(snapshot.tokens)
        if n > self.n_ctx or not (self._set_state(snapshot.data, _WHOLE) and self._ends_at(n)):
            self.clear()
            return False
        self.held = list(snapshot.tokens)
        self._checkpoints = list(snapshot.checkpoints)
        return True

    def _state(self, flags: int) -> State | None:
        size = int(self._lib.llama_state_seq_get_size_ext(self._context, 0, flags))
        data = np.empty(size, np.uint8)
        got = self._lib.llama_state_seq_get_data_ext(self._context, _bytes(data), size, 0, flags) if size else 0
        return data if size and got == size else None

    def _set_state(self, data: State, flags: int) -> bool:
        with native.capture_log():
            read = self._lib.llama_state_seq_set_data_ext(self._context, _bytes(data), data.nbytes, 0, flags)
        return bool(read == data.nbytes)

    def _ends_at(self, n: int) -> bool:
        return bool(self._lib.llama_memory_seq_pos_max(self._memory, 0) == n - 1)

    # Computing

    def extend(self, tokens: Sequence[int], marks: Collection[int] = ()) -> None:
        """Compute `tokens` after those held, with a checkpoint where as many are held as one of `marks` says.

        Raises Cancelled and GenerationError; the tokens of whole batches before that stay held.
        """
        begin, end = len(self.held), len(self.held) + len(tokens)
        stops = sorted({n for n in marks if begin <= n < end}) if self.needs_checkpoints else []
        position = begin
        with aborting(self.abort):
            for stop in [*stops, end]:
                while position < stop:
                    if self._stop:
                        raise Cancelled
                    step = min(self.batch, stop - position)
                    self._decode(tokens[position - begin : position - begin + step])
                    position += step
                if stop in stops:
                    self.checkpoint()

    def advance(self, tokens: Sequence[int], *, interruptible: bool) -> None:
        """Compute at most MOST_OUTPUTS tokens, all of which have logits then: `logits(0)` and so on.

        What is not `interruptible` ends before an abort is looked at: a memory that cannot be cut stays sound.
        Raises Cancelled and GenerationError, and nothing of `tokens` is held then.
        """
        if self._stop:
            raise Cancelled
        if interruptible:
            # Python hears of a signal after the call: soon enough, where that is short, and cheaper.
            with aborting(self.abort) if self._advance_seconds > _SHORT_SECONDS else nullcontext():
                began = time.perf_counter()
                self._decode(tokens, all_logits=True)
                self._advance_seconds = time.perf_counter() - began
        else:
            self._interruptible = False
            try:
                self._decode(tokens, all_logits=True)
            finally:
                self._interruptible = True
        if self.memory is Memory.STATE:
            self._on_trial = min(len(tokens) - 1, self.most_drafted)

    def _decode(self, tokens: Sequence[int], *, all_logits: bool = False) -> None:
        before, self._on_trial = len(self.held), 0
        self.held.extend(tokens)
        batch = fill_batch(self._batch, tokens, before, logits_from=0) if all_logits else None
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        if batch is None:
            batch = self._lib.llama_batch_get_one(ids, len(tokens))
        if len(tokens) > MOST_OUTPUTS:
            announce(len(tokens))
        try:
            with native.capture_log() as log:
                status = self._lib.llama_decode(self._context, batch)
        except BaseException:  # Ctrl-C in the calling thread, before or after the call
            del self.held[self._lib.llama_memory_seq_pos_max(self._memory, 0) + 1 :]
            raise
        if status == 0:
            if self.follower is not None:
                self.follower.follow(tokens, before)
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

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        """Logits [n_vocab] of a token of the last batch, valid until the next. Raises GenerationError.

        They are looked at: sampling from what are no numbers would end the process.
        """
        pointer = self._lib.llama_get_logits_ith(self._context, index)
        address = ctypes.addressof(pointer.contents)
        if (logits := self._rows.get(address)) is None:  # making the array takes longer than reading it
            logits = self._rows[address] = np.ctypeslib.as_array(pointer, shape=(self.n_vocab,))
        if not np.isfinite(logits.max()):  # NaN anywhere makes it NaN
            self.clear()
            raise GenerationError(
                "the model computes no numbers (NaN or infinity)",
                hint="its file is damaged: fetch or convert it again",
            )
        return logits

    @property
    def pointer(self) -> Any:
        """The `llama_context *`."""
        return self._context

    def close(self) -> None:
        context, self._context = self._context, None
        if context:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(context)


def fill_batch(batch: Any, tokens: Sequence[int], position: int, *, logits_from: int) -> Any:
    """Put `tokens` into a `llama_batch` that has room for them, the first at `position`; with logits from one on."""
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i] = token, position + i
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.logits[i] = i >= logits_from
    return batch


def _bytes(data: State) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
