"""An engine that follows the protocol and says what the test tells it to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from models.errors import ContextOverflow, TemplateError
from runner.engine.protocol import (
    FinishReason,
    GenerationChunk,
    GenerationStats,
    Message,
    ModelInfo,
    Sampling,
)

Reply = str | Sequence[str] | Exception
"""A text (given out character by character), the pieces of one, or an error to raise before any of it."""


class FakeEngine:
    """One scripted reply a call, in order; the last one again when they run out.

    A token is the number of a character. `prompts` and `samplings` record the calls; `before_chunk(i)` runs
    before the i-th piece of a reply goes out, for a test that wants to cancel or to look in the middle.
    """

    def __init__(
        self,
        *replies: Reply,
        n_ctx: int = 4096,
        chat_template: bool = True,
        info: ModelInfo | None = None,
        before_chunk: Callable[[int], None] = lambda index: None,
    ) -> None:
        self.replies: list[Reply] = list(replies) or ["Hello."]
        self.prompts: list[list[int]] = []
        self.chats: list[list[Message]] = []
        self.samplings: list[Sampling] = []
        self.closed = False
        self.cancelled = threading.Event()
        self.before_chunk = before_chunk
        self._chat_template = chat_template
        self._held: list[int] = []
        self._info = info or ModelInfo(
            path=Path("fake.gguf"),
            name="Fake",
            description="fake 1B Q4_K_M",
            n_ctx=n_ctx,
            n_ctx_train=n_ctx,
            n_layers=4,
            gpu_layers=0,
            device="CPU",
            load_seconds=0.25,
        )

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template

    @property
    def default_sampling(self) -> Sampling:
        return Sampling()

    def encode_text(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def encode_chat(self, messages: Sequence[Message], *, think: bool | None = None) -> list[int]:
        self.chats.append(list(messages))
        if not self._chat_template:
            raise TemplateError("Fake is a base model: it has no chat template", hint="use `handmill run`")
        return self.encode_text("".join(f"{m.role}: {m.content}\n" for m in messages) + "assistant: ")

    def chat(
        self, messages: Sequence[Message], sampling: Sampling | None = None, *, shift: bool = False
    ) -> Iterator[GenerationChunk]:
        return self.generate(self.encode_chat(messages), sampling)

    def generate(self, tokens: Sequence[int], sampling: Sampling | None = None) -> Iterator[GenerationChunk]:
        sampling = sampling or self.default_sampling
        self.prompts.append(list(tokens))
        self.samplings.append(sampling)
        self.cancelled.clear()
        if len(tokens) > self._info.n_ctx:
            raise ContextOverflow(
                f"the prompt has {len(tokens)} tokens, the context {self._info.n_ctx}",
                prompt_tokens=len(tokens),
                n_ctx=self._info.n_ctx,
            )
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, Exception):
            raise reply
        common = 0
        while common < min(len(self._held), len(tokens) - 1) and self._held[common] == tokens[common]:
            common += 1
        self._held = list(tokens)
        finish: FinishReason = "stop"
        done = 0
        for index, piece in enumerate(reply):
            self.before_chunk(index)
            if self.cancelled.is_set():
                finish = "cancelled"
                break
            if sampling.max_tokens is not None and done >= sampling.max_tokens:
                finish = "length"
                break
            done += 1
            self._held.append(ord(piece[0]))
            yield GenerationChunk(piece, ord(piece[0]), self._stats(tokens, common, done))
        yield GenerationChunk("", None, self._stats(tokens, common, done), finish)

    def _stats(self, tokens: Sequence[int], cached: int, done: int) -> GenerationStats:
        return GenerationStats(len(tokens), cached, done, prefill_seconds=0.5, generate_seconds=0.1 * done)

    def cancel(self) -> None:
        self.cancelled.set()

    def close(self) -> None:
        self.closed = True
