"""The engine in this process: llama.cpp through its low-level functions.

`load()` gives a `LocalEngine`, which follows `runner.engine.protocol.Engine`.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from models import native
from models.errors import ContextOverflow, GenerationError
from models.text import printable
from runner.engine.branches import NO_TOKEN, Branches
from runner.engine.context import Context
from runner.engine.generation import Request, reply, thinking_after
from runner.engine.loading import Loaded, load_file
from runner.engine.memory_watch import MemoryWatch
from runner.engine.normalize import nfc, normalizes
from runner.engine.protocol import GenerationChunk, LoadOptions, LoadProgress, Message, ModelInfo, Sampling
from runner.engine.recommended import recommended_sampling
from runner.engine.state_files import WORTH_STORING
from runner.engine.turn import Turn
from runner.prompt import PromptEncoder
from runner.thinking import find_marks

if TYPE_CHECKING:
    from runner.bench import Speed

Result = TypeVar("Result")

_CLOSED = "the model was closed"


def load(path: Path, options: LoadOptions | None = None, progress: LoadProgress | None = None) -> LocalEngine:
    """Load a GGUF file. Raises ModelFileError, LoadError, UsageError."""
    options = options or LoadOptions()
    return LocalEngine(load_file(path, options, progress), options)


class LocalEngine:
    """A model loaded in this process. One generation at a time; `cancel` and `close` may come from any thread.

    All is computed in the thread that iterates. Ctrl-C there stops the computation within milliseconds and leaves the
    engine usable.
    """

    def __init__(self, loaded: Loaded, options: LoadOptions) -> None:
        self._loaded = loaded
        self._context = loaded.context
        self._vocabulary = loaded.vocabulary
        self._nfc = normalizes(loaded.metadata.get("tokenizer.ggml.pre", ""))
        self._prompts = PromptEncoder(
            loaded.vocabulary,
            loaded.metadata.get("tokenizer.chat_template"),
            normalize=nfc if self._nfc else lambda text: text,
            parse_special=options.parse_special,
        )
        self._thought_marks = find_marks(loaded.metadata.get("tokenizer.chat_template", ""))
        self._branches = Branches(loaded.context, loaded.branch_bytes)
        self._states = loaded.states
        self._watch = MemoryWatch(loaded.device_names)
        self._waits = options.when_busy == "wait"
        self._turn = Turn()
        self._native = threading.RLock()  # held while llama.cpp computes: close() waits for that
        self._closed = False
        self._free = weakref.finalize(self, _free, loaded)
        lib = native.library()
        self._info = ModelInfo(
            path=loaded.gguf.path,
            name=printable(loaded.gguf.name),
            description=printable(_description(loaded)),
            n_ctx=loaded.context.n_ctx,
            n_ctx_train=lib.llama_model_n_ctx_train(loaded.model),
            n_layers=loaded.n_layers,
            gpu_layers=loaded.gpu_layers,
            device=loaded.device,
            device_names=loaded.device_names,
            load_seconds=loaded.seconds,
            threads=loaded.context.threads,
            batch=loaded.context.batch,
            notes=loaded.notes,
        )

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def has_chat_template(self) -> bool:
        return self._prompts.has_template

    @property
    def default_sampling(self) -> Sampling:
        return recommended_sampling(self._loaded.metadata)

    def encode_text(self, text: str) -> list[int]:
        """Tokens of a text to be continued, with the marks that the model wants around it."""
        self._check_open()
        return self._prompts.encode_text(text)

    def encode_chat(self, messages: Sequence[Message], *, think: bool | None = None) -> list[int]:
        """Tokens of a conversation up to where the assistant speaks. Raises TemplateError."""
        self._check_open()
        return self._prompts.encode_chat(messages, think)

    def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        shift: bool = False,
        given: Sequence[int] = (),
    ) -> Iterator[GenerationChunk]:
        """The assistant's next turn; see the protocol, and `Request`.

        Raises TemplateError, ContextOverflow, GenerationError.
        """
        sampling = sampling or self.default_sampling
        think = sampling.think
        tokens = self.encode_chat(messages, think=think)
        marks = self._prompts.marks(messages, tokens, think) if shift or self._context.needs_checkpoints else set()
        return self._checked(
            Request(
                tokens,
                sampling,
                marks,
                shift_after=min(marks, default=0) if shift else None,
                thinking=thinking_after(tokens, self._thought_marks, self._vocabulary),
                given=given,
            )
        )

    def generate(
        self,
        tokens: Sequence[int],
        sampling: Sampling | None = None,
        *,
        marks: Collection[int] = (),
        shift_after: int | None = None,
        given: Sequence[int] = (),
    ) -> Iterator[GenerationChunk]:
        """Continue `tokens`; see the protocol, and `Request`. Raises ContextOverflow, GenerationError."""
        sampling = sampling or self.default_sampling
        return self._checked(Request(list(tokens), sampling, marks, shift_after, given=given))

    def _checked(self, request: Request) -> Iterator[GenerationChunk]:
        tokens = request.tokens
        self._check_open()
        if not self._waits:
            self._turn.check_free()
        if not tokens:
            raise GenerationError("there is nothing to continue: the prompt is empty")
        if len(tokens) > self._context.n_ctx:
            raise ContextOverflow(
                f"the prompt has {len(tokens)} tokens and the context holds {self._context.n_ctx}",
                hint=f"shorten it, or make room: --context {len(tokens) + 512}",
                prompt_tokens=len(tokens),
                n_ctx=self._context.n_ctx,
            )
        wrong = next((token for token in tokens if not 0 <= token < self._vocabulary.n_tokens), None)
        if wrong is not None:
            raise GenerationError(f"token {wrong} is outside the vocabulary of {self._vocabulary.n_tokens}")
        return self._generate(request)

    def _generate(self, request: Request) -> Iterator[GenerationChunk]:
        with self._turn.taken(wait=self._waits):
            self._check_open()
            self._context.clear_abort()
            speculation = self._loaded.speculation
            chunks = reply(self._context, self._vocabulary, self._recall, speculation, request, self._locked)
            with closing(chunks):
                for chunk in chunks:
                    notice = self._notice()
                    yield replace(chunk, notice=notice) if notice else chunk

    def _notice(self) -> str:
        with self._native:
            return "" if self._closed else self._watch.look()

    def _recall(self, tokens: Sequence[int]) -> int:
        """Bring the context as near to the prompt as anything is that was computed once."""
        held = self._branches.switch(tokens)
        if self._states is None or len(tokens) - held < WORTH_STORING:
            return held
        found = [(self._context.keepable_of(s.without_data(), tokens), s) for s in self._states.stored()]
        keeps, best = max(found, key=lambda entry: entry[0], default=(0, None))
        if best is None or keeps < held + WORTH_STORING or (snapshot := self._states.read(best)) is None:
            return held
        return self._branches.take(snapshot, tokens)

    def _keep_on_disk(self) -> None:
        """Leave what is held to later processes, unless that is little more than they have already."""
        held = [*self._context.held, NO_TOKEN]
        if self._states is None or len(held) <= WORTH_STORING:
            return
        there = [self._context.keepable_of(s.without_data(), held) for s in self._states.stored()]
        if len(held) - max(there, default=0) > WORTH_STORING and (snapshot := self._context.snapshot()):
            with suppress(OSError):  # a full disk costs the next start time, nothing else
                self._states.write(snapshot)

    def _locked(self, work: Callable[[], Result]) -> Result:
        with self._native:
            self._check_open()
            return work()

    @property
    def context(self) -> Context:
        """What is beneath the replies, to measure and test it: nothing else may run meanwhile."""
        self._check_open()
        return self._context

    def speeds(self, *, prompt: int, generate: int, depths: Sequence[int], rounds: int) -> Iterator[Speed]:
        """How fast it is; see the protocol. Raises GenerationError."""
        from runner.bench import measure

        self._check_open()
        self._context.clear_abort()
        gguf = self._loaded.gguf
        return measure(self._context, gguf, prompt=prompt, generate=generate, depths=depths, rounds=rounds)

    def cancel(self) -> None:
        """Stop a running generation soon, from any thread."""
        self._context.abort()

    def close(self) -> None:
        """Free the model. A generation that runs is cancelled; calling it again does nothing."""
        self.cancel()
        with self._native:
            if self._closed:
                return
            self._closed = True
            with suppress(Exception):  # whatever it is, the model goes
                self._keep_on_disk()
            self._free()

    def _check_open(self) -> None:
        if self._closed:
            raise GenerationError(_CLOSED)

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _free(loaded: Loaded) -> None:
    loaded.context.abort()
    loaded.context.close()
    if loaded.speculation is not None:
        loaded.speculation.drafter.close()
    native.library().llama_model_free(loaded.model)


def _description(loaded: Loaded) -> str:
    buffer = ctypes.create_string_buffer(256)
    native.library().llama_model_desc(loaded.model, buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace")
