"""A conversation: its turns, its system message, and how much of the context it has used.

Knows nothing of terminals and nothing of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

from models.errors import ContextOverflow
from runner.engine.protocol import Engine, GenerationChunk, GenerationStats, Message, Sampling


class ChatSession:
    """One conversation with an engine. `sampling` may be replaced between turns; None is the model's own."""

    def __init__(self, engine: Engine, system: str | None = None, sampling: Sampling | None = None) -> None:
        self.engine = engine
        self.sampling = sampling or engine.default_sampling
        self.messages: list[Message] = []
        self.last_stats = GenerationStats()
        self._used = 0
        self.set_system(system)

    @property
    def system(self) -> str | None:
        first = self.messages[0] if self.messages else None
        return first.content if first is not None and first.role == "system" else None

    @property
    def context_used(self) -> int:
        """Tokens of the context that the conversation took in the last turn."""
        return self._used

    def set_system(self, text: str | None) -> None:
        """Replace the system message, or take it away; the turns stay."""
        turns = [message for message in self.messages if message.role != "system"]
        self.messages = [Message("system", text), *turns] if text else turns

    def clear(self) -> None:
        """Forget the turns; the system message stays."""
        self.messages = [message for message in self.messages if message.role == "system"]
        self.last_stats = GenerationStats()
        self._used = 0

    def reply(self, text: str) -> Iterator[GenerationChunk]:
        """Say `text` and give out the reply as it comes.

        What came of a reply that was cancelled, interrupted or failed stays in the conversation. Where nothing
        came, `text` is taken back too, so that it can be said again. Raises TemplateError, GenerationError and,
        when the conversation outgrows the context, ContextOverflow.
        """
        before = len(self.messages)
        self.messages.append(Message("user", text))
        pieces: list[str] = []
        tokens: list[int] = []
        complete = False
        chunks = self._generate()
        try:
            for chunk in chunks:
                pieces.append(chunk.text)
                if chunk.token is not None:
                    tokens.append(chunk.token)
                self.last_stats = chunk.stats
                # the last token of a full context was picked, but takes no place in it any more
                self._used = min(chunk.stats.prompt_tokens + chunk.stats.generated_tokens, self.engine.info.n_ctx)
                complete = chunk.finish_reason not in (None, "cancelled")
                if chunk.finish_reason is not None:
                    # Kept before the last chunk goes out: nobody has to ask for more to have it.
                    self._keep(before, pieces, tokens, complete)
                yield chunk
        except BaseException:
            self._keep(before, pieces, tokens, complete)
            raise
        finally:
            chunks.close()  # the engine is free again, whatever still holds this frame

    def _generate(self) -> Generator[GenerationChunk, None, None]:
        try:
            yield from self.engine.chat(self.messages, self.sampling)
        except ContextOverflow as error:
            facts = dict(error.facts)
            raise ContextOverflow(
                f"the conversation no longer fits: {error}",
                hint="/clear starts over; --context N gives more room",
                **facts,
            ) from error

    def _keep(self, before: int, pieces: list[str], tokens: list[int], complete: bool) -> None:
        """End the turn that began at `before`; calling it again changes nothing."""
        if len(self.messages) != before + 1:
            return
        if tokens or complete:
            self.messages.append(Message("assistant", "".join(pieces), tuple(tokens)))
        else:
            del self.messages[before:]
