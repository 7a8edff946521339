"""The engine in a process of its own, for devices that end theirs.

A GPU that fails, and another machine that is away, end the process that computes on them, or keep it waiting for
ever. So it is a process that may end: this side keeps the tokens, waits for each sign of life so long and no longer,
and starts it again with less: without the machine that is away, with fewer layers on a GPU that is full, in the end on
the CPU alone. A reply that was broken off goes on after the tokens that came.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from models.errors import GenerationError, HandmillError, LoadError
from models.isolated import Ended, Isolated, Kind, Silent, isolation
from runner.engine import child
from runner.engine.child import Facts
from runner.engine.lookout import Lookout, is_alive
from runner.engine.protocol import (
    GenerationChunk,
    GenerationStats,
    LoadOptions,
    LoadProgress,
    Message,
    ModelInfo,
    Sampling,
)
from runner.engine.turn import Turn
from runner.placement import fewer_layers

if TYPE_CHECKING:
    from runner.bench import Speed

Result = TypeVar("Result")

_LOOK_EVERY = 0.1
_SILENCE = 1.0
"""Seconds after which workers are asked whether they are still there."""
_STOPS_WITHIN = 0.2
"""Seconds after which a reply that was cancelled ends here, whatever the device still computes."""
_LOAD_SILENCE = 5.0
"""The same while a model is loaded: what connects to a worker then should find it free."""
_LOAD_SECONDS = 300
"""Between two signs of a load: a large tensor over a slow line."""
_CLOSE_SECONDS = 60
"""What was computed of a long conversation is written to the disk."""
_FATAL_STATUS = -2
"""From here down, llama_decode says that a device failed to compute."""
_FULL = ("out of memory", "failed to allocate", "unable to allocate", "alloc_buffer", "cudamalloc")
_CLOSED = "the model was closed"
_DOCTOR = "`handmill doctor` looks for what is wrong with this machine."


@dataclass
class Patience:
    """How many seconds to wait until some tokens are computed: many times what the slowest took so far."""

    first: float = 180.0
    """While nothing is known, and a second more for each token: a device may have to compile its kernels."""
    least: float = 20.0
    factor: float = 10.0
    slowest: float | None = field(default=None, init=False)
    """Seconds for a token."""

    def seconds(self, tokens: int) -> float:
        if self.slowest is None:
            return self.first + tokens
        return max(self.least, self.factor * self.slowest * tokens)

    def waited(self, seconds: float, tokens: int) -> None:
        self.slowest = max(self.slowest or 0.0, seconds / tokens)


class _Process:
    """An engine's process, with the model loaded. Raises HandmillError, and Ended where it ends instead."""

    def __init__(self, path: Path, options: LoadOptions, progress: LoadProgress | None) -> None:
        self._stack = ExitStack()
        self.apart: Isolated = self._stack.enter_context(isolation("runner.engine.child", loud=options.verbose))
        self._lookout = self._stack.enter_context(closing(Lookout(options.workers)))
        self.options = options
        try:
            self.facts = self._load(path, progress or (lambda share: None))
            self._lookout = self._stack.enter_context(closing(Lookout(self.facts.workers)))
            self._lookout.wake()
        except BaseException:
            self.end()
            raise

    @property
    def gpu_layers(self) -> int:
        return self.facts.info.gpu_layers

    def end(self) -> None:
        self._stack.close()

    def sign_of_life(
        self, seconds: float, given_up: Callable[[], bool] = lambda: False, *, silence: float = _SILENCE
    ) -> tuple[Kind, Any, float]:
        """What is heard next, and after how many seconds; while this one is stopped (Ctrl-Z), none pass.

        After a `silence` workers are asked whether they are still there. Raises Ended, also after `seconds` or when a
        worker hangs, and Silent when it was `given_up`.
        """
        waited = 0.0
        while True:
            began = time.monotonic()
            try:
                if given_up():
                    raise Silent
                kind, value = self.apart.hear(_LOOK_EVERY)
                return kind, value, waited + min(time.monotonic() - began, _LOOK_EVERY)
            except Silent:
                waited += _LOOK_EVERY
                if given_up():
                    raise
                if waited > silence:
                    self._lookout.wake()
                    if (away := self._lookout.lost()) is not None:
                        raise Ended(f"worker {away} no longer answers") from None
                if waited > seconds:
                    raise Ended(f"nothing came from it for {waited:.0f} s") from None

    def _load(self, path: Path, progress: LoadProgress) -> Facts:
        self.apart.ask(child.load, path, self.options)
        known = False
        while True:
            kind, value, _ = self.sign_of_life(_LOAD_SECONDS, silence=_LOAD_SILENCE)
            if kind is Kind.END:
                facts: Facts = value
                return facts
            if not known:  # weights are on their way: whoever takes some says now that it is in use
                known = True
                self._lookout.wake()
            progress(value)


class SupervisedEngine:
    """A model loaded in a process of its own; follows `runner.engine.protocol.LoadedEngine`.

    Raises ModelFileError, LoadError, UsageError when it is made.
    """

    def __init__(
        self,
        path: Path,
        options: LoadOptions,
        progress: LoadProgress | None = None,
        *,
        patience: Patience | None = None,
    ) -> None:
        self._path, self._options = path, options
        self._waits = options.when_busy == "wait"
        self._turn = Turn()
        self._patience = patience or Patience()
        self._closed = self._tried_again = False
        self._computes = 1
        """Tokens that were last said to be computed next, also of a call that was abandoned."""
        self._cancelled_at: float | None = None
        self._running: list[_Process] = []
        self._free = weakref.finalize(self, _end_all, self._running)
        notes: list[str] = []
        try:
            self._running.append(_Process(path, options, progress))
        except Ended as end:
            notes += self._start_again(end, options)
        info = self._process.facts.info
        self._info = replace(info, notes=(*notes, *info.notes))

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def has_chat_template(self) -> bool:
        return self._process.facts.has_chat_template

    @property
    def default_sampling(self) -> Sampling:
        return self._process.facts.default_sampling

    def encode_text(self, text: str) -> list[int]:
        """See the protocol."""
        return self._asked(child.encode_text, text)

    def encode_chat(self, messages: Sequence[Message], *, think: bool | None = None) -> list[int]:
        """See the protocol. Raises TemplateError."""
        return self._asked(child.encode_chat, list(messages), think)

    def chat(
        self, messages: Sequence[Message], sampling: Sampling | None = None, *, shift: bool = False
    ) -> Iterator[GenerationChunk]:
        """See the protocol. Raises TemplateError, ContextOverflow, GenerationError."""
        self._check_free()
        return self._reply(child.chat, list(messages), sampling, shift)

    def generate(self, tokens: Sequence[int], sampling: Sampling | None = None) -> Iterator[GenerationChunk]:
        """See the protocol. Raises ContextOverflow, GenerationError."""
        self._check_free()
        return self._reply(child.generate, list(tokens), sampling)

    def speeds(self, *, prompt: int, generate: int, depths: Sequence[int], rounds: int) -> Iterator[Speed]:
        """See the protocol. Raises GenerationError."""
        self._check_free()
        with self._turn.taken(wait=self._waits):
            self._process.apart.ask(child.speeds, prompt, generate, list(depths), rounds)
            try:
                yield from self._pieces()
            except Ended as end:
                raise GenerationError(f"the measurement ended: {end}") from None

    def cancel(self) -> None:
        """Stop a running generation soon, from any thread."""
        self._cancelled_at = time.monotonic()
        for process in self._running:
            process.apart.tell(child.cancel)

    def close(self) -> None:
        """Free the model. A generation that runs is cancelled; calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            for process in self._running:
                process.apart.beside(child.close, seconds=_CLOSE_SECONDS)
        except (Ended, HandmillError):
            pass  # it is ended all the same
        finally:
            self._free()

    def __enter__(self) -> SupervisedEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _process(self) -> _Process:
        if self._closed:
            raise GenerationError(_CLOSED)
        if not self._running:  # starting it again failed, or was broken off
            try:
                self._running.append(_Process(self._path, self._options, None))
            except Ended as end:
                raise GenerationError(f"the engine's process ended: {end}", hint=_DOCTOR) from None
        return self._running[0]

    def _check_free(self) -> None:
        _ = self._process
        if not self._waits:
            self._turn.check_free()

    def _asked(self, function: Callable[..., Result], *args: object) -> Result:
        try:
            return self._process.apart.beside(function, *args, seconds=self._patience.first)
        except Ended as end:
            with self._turn.taken(wait=True):
                for _ in self._recovered(end):
                    pass
            return self._asked(function, *args)

    def _reply(self, function: Callable[..., object], *args: object) -> Iterator[GenerationChunk]:
        with self._turn.taken(wait=self._waits):
            self._cancelled_at, self._tried_again = None, False
            given: list[int] = []
            before = stats = GenerationStats()
            while True:
                process, finished = self._process, False
                try:
                    process.apart.ask(function, *args, tuple(given))
                    for chunk in self._pieces():
                        stats = _after(before, chunk.stats)
                        if chunk.token is not None:
                            given.append(chunk.token)
                        yield replace(chunk, stats=stats)
                    finished = True
                    return
                except Silent:
                    yield GenerationChunk("", None, stats, "cancelled")
                    return
                except (Ended, GenerationError) as error:
                    if self._closed:
                        yield GenerationChunk("", None, stats, "cancelled")
                        return
                    if not _is_lost(error):
                        raise
                    for notice in self._recovered(error):
                        yield GenerationChunk("", None, stats, notice=notice)
                    before = stats
                finally:
                    if not finished:  # Ctrl-C, or a caller who wants no more
                        process.apart.abandon()
                        process.apart.tell(child.cancel)

    def _pieces(self) -> Iterator[Any]:
        """What comes of the call that was asked, until it ends.

        Raises Ended; Silent when it was cancelled and nothing comes, or the model was closed.
        """
        process, heard = self._process, False
        while True:
            # a CPU may be slow, and does not hang
            seconds = self._patience.seconds(self._computes) if process.gpu_layers else inf
            kind, value, waited = process.sign_of_life(seconds, self._given_up)
            if heard:  # before the first sign nothing of this call was computed, but perhaps the rest of another
                self._patience.waited(waited, self._computes)
            heard, self._computes = True, value if kind is Kind.WORKING else 1
            if kind is Kind.END:
                return
            if kind is Kind.PIECE:
                yield value

    def _given_up(self) -> bool:
        late = self._cancelled_at is not None and time.monotonic() - self._cancelled_at > _STOPS_WITHIN
        return self._closed or late

    def _recovered(self, lost: Ended | GenerationError) -> Iterator[str]:
        """Load again with less, and say so. Raises GenerationError where nothing is left to try."""
        if self._closed:
            raise GenerationError(_CLOSED)
        process, self._computes = self._running.pop(), 1
        process.end()
        options = self._options = replace(process.options, context=process.facts.info.n_ctx)
        yield from self._start_again(lost, options, process.facts.info.gpu_layers)
        self._info = self._process.facts.info
        yield f"the model is loaded again: {self._info.gpu_layers}/{self._info.n_layers} layers on {self._info.device}"
        yield from self._info.notes

    def _start_again(self, lost: Exception, options: LoadOptions, layers: int | None = None) -> Iterator[str]:
        why = str(lost)
        for less, how in self._less(lost, options, layers):
            yield f"the device was lost ({why}); {how}"
            self._options = less
            try:
                self._running.append(_Process(self._path, less, None))
                return
            except (Ended, LoadError) as error:
                why = str(error)
        raise GenerationError(
            f"the engine's process ended and could not be started again: {why}",
            hint=_DOCTOR,
        ) from None

    def _less(self, lost: Exception, options: LoadOptions, layers: int | None) -> Iterator[tuple[LoadOptions, str]]:
        """What to load with in turn, and that in words: each has less than the one before, the last one the CPU."""
        if options.gpu_layers == 0:
            return
        there = tuple(endpoint for endpoint in options.workers if is_alive(endpoint))
        if there != options.workers:
            away = ", ".join(set(options.workers) - set(there))
            yield replace(options, workers=there), f"tried again without {away}"
        elif there and not self._tried_again:  # it ended, and `handmill worker` has started it again
            self._tried_again = True
            yield options, "tried again"
        if layers and _is_full(lost):
            for count in fewer_layers(layers):
                if count:
                    yield replace(options, gpu_layers=count), f"tried again with {count} layers on the GPU"
        yield replace(options, gpu_layers=0), "tried again on the CPU alone"
        yield replace(options, gpu_layers=0, context=None), "tried again on the CPU with a context that fits"


def _is_lost(error: Ended | GenerationError) -> bool:
    """Whether a device, and not what was asked, is to blame."""
    status = error.facts.get("status") if isinstance(error, GenerationError) else None
    return isinstance(error, Ended) or (isinstance(status, int) and status <= _FATAL_STATUS)


def _is_full(error: Exception) -> bool:
    said = error.said if isinstance(error, Ended) else " ".join(getattr(error, "facts", {}).get("log", ()))
    return any(sign in f"{error} {said}".lower() for sign in _FULL)


def _after(before: GenerationStats, now: GenerationStats) -> GenerationStats:
    """The counts of a reply that went on elsewhere: tokens given before are among those generated, times are not."""
    return replace(
        now,
        cached_tokens=before.cached_tokens if before.prompt_tokens else now.cached_tokens,
        prefill_seconds=before.prefill_seconds + now.prefill_seconds,
        generate_seconds=before.generate_seconds + now.generate_seconds,
        drafted_tokens=before.drafted_tokens + now.drafted_tokens,
        accepted_tokens=before.accepted_tokens + now.accepted_tokens,
    )


def _end_all(running: list[_Process]) -> None:
    while running:
        running.pop().end()
