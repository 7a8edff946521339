"""The engine in this process: llama.cpp through its low-level functions.

`load()` gives a `LocalEngine`, which follows `runner.engine.protocol.Engine`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from models import native
from models.errors import ContextOverflow, GenerationError
from models.text import printable
from runner.engine.context import Cancelled
from runner.engine.loading import Loaded, load_file
from runner.engine.normalize import nfc, normalizes
from runner.engine.protocol import (
    FinishReason,
    GenerationChunk,
    GenerationStats,
    LoadOptions,
    LoadProgress,
    Message,
    ModelInfo,
    Sampling,
)
from runner.engine.recommended import recommended_sampling
from runner.engine.sampler import Sampler
from runner.engine.text_stream import TextStream
from runner.prompt import PromptEncoder

Result = TypeVar("Result")

DIRECT_BELOW = 0.15
"""Seconds. A step quicker than this runs in the calling thread: Ctrl-C can wait that long, and waking another
thread for every token costs a multiple of the computation on a busy machine."""

_CLOSED = "the model was closed"


def load(path: Path, options: LoadOptions | None = None, progress: LoadProgress | None = None) -> LocalEngine:
    """Load a GGUF file. Raises ModelFileError, LoadError, UsageError."""
    options = options or LoadOptions()
    return LocalEngine(load_file(path, options, progress), parse_special=options.parse_special)


class LocalEngine:
    """A model loaded in this process. One generation at a time; `cancel` may come from any thread.

    What takes long runs in a worker thread, so that the thread which iterates stays open to Ctrl-C: interrupted,
    it stops the computation within milliseconds and leaves the engine usable.
    """

    def __init__(self, loaded: Loaded, *, parse_special: bool = False) -> None:
        self._loaded = loaded
        self._context = loaded.context
        self._vocabulary = loaded.vocabulary
        self._nfc = normalizes(loaded.metadata.get("tokenizer.ggml.pre", ""))
        self._prompts = PromptEncoder(
            loaded.vocabulary,
            loaded.metadata.get("tokenizer.chat_template"),
            normalize=nfc if self._nfc else lambda text: text,
            parse_special=parse_special,
        )
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="handmill-engine")
        self._busy = False
        self._closed = False
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
            load_seconds=loaded.seconds,
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

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation up to where the assistant speaks. Raises TemplateError."""
        self._check_open()
        return self._prompts.encode_chat(messages)

    def generate(self, tokens: Sequence[int], sampling: Sampling) -> Iterator[GenerationChunk]:
        """Continue `tokens`; see the protocol. Raises ContextOverflow, GenerationError."""
        self._check_open()
        if self._busy:
            raise GenerationError("a reply is still being generated")
        if not tokens:
            raise GenerationError("there is nothing to continue: the prompt is empty")
        if len(tokens) > self._context.n_ctx:
            raise ContextOverflow(
                f"the prompt has {len(tokens)} tokens and the context holds {self._context.n_ctx}",
                hint=f"shorten it, or make room: --context {len(tokens) + 512}",
                prompt_tokens=len(tokens),
                n_ctx=self._context.n_ctx,
            )
        return self._generate(list(tokens), sampling)

    def _generate(self, tokens: list[int], sampling: Sampling) -> Iterator[GenerationChunk]:
        if self._busy:
            raise GenerationError("a reply is still being generated")
        context = self._context
        context.clear_abort()
        sampler = Sampler(sampling, self._vocabulary, tokens)
        stream = TextStream()
        started = time.perf_counter()
        cached = generated = 0
        prefill_seconds = generate_seconds = 0.0
        step_seconds = DIRECT_BELOW
        finish: FinishReason = "stop"
        limit = sampling.max_tokens

        def stats() -> GenerationStats:
            return GenerationStats(len(tokens), cached, generated, prefill_seconds, generate_seconds)

        def prefill() -> int:
            reused = context.reuse(tokens)
            context.extend(tokens[reused:])
            context.check_logits()
            return reused

        def advance(token: int) -> None:
            context.extend([token])
            context.check_logits()

        try:
            self._busy = True
            cached = self._run(prefill)
            prefill_seconds = time.perf_counter() - started
            while True:
                began = time.perf_counter()
                token = sampler.sample(context.pointer)
                if self._vocabulary.is_eog(token):
                    generate_seconds += time.perf_counter() - began
                    break
                generated += 1
                generate_seconds += time.perf_counter() - began
                yield GenerationChunk(stream.feed(self._vocabulary.piece(token)), token, stats())
                if context.abort_requested:
                    raise Cancelled
                if (limit is not None and generated >= limit) or len(context.held) >= context.n_ctx:
                    finish = "length"
                    break
                began = time.perf_counter()
                if step_seconds < DIRECT_BELOW:
                    advance(token)
                else:
                    self._run(partial(advance, token))
                step_seconds = time.perf_counter() - began
                generate_seconds += step_seconds
        except Cancelled:
            finish = "cancelled"
        finally:
            sampler.close()
            self._busy = False
        yield GenerationChunk("", None, stats(), finish)

    def _run(self, work: Callable[[], Result]) -> Result:
        """`work` in the worker thread. An exception that reaches the waiting thread, such as Ctrl-C, stops it."""
        future: Future[Result] = self._worker.submit(work)
        try:
            while True:
                try:
                    return future.result(0.2)  # on Windows only a wait that ends lets Ctrl-C through
                except TimeoutError:
                    if future.done():
                        return future.result()
        except BaseException:
            self._context.abort()
            while not future.done():
                time.sleep(0.001)
            raise

    def cancel(self) -> None:
        """Stop a running generation soon, from any thread."""
        self._context.abort()

    def close(self) -> None:
        """Free the model. A generation that runs is cancelled; calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        self.cancel()
        self._worker.shutdown(wait=True)
        self._context.close()
        native.library().llama_model_free(self._loaded.model)

    def _check_open(self) -> None:
        if self._closed:
            raise GenerationError(_CLOSED)

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _description(loaded: Loaded) -> str:
    import ctypes

    buffer = ctypes.create_string_buffer(256)
    native.library().llama_model_desc(loaded.model, buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace")
