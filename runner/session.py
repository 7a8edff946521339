"""A conversation: its turns, its system message, and how much of the context it has used.

Knows nothing of terminals and nothing of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Literal

from models.errors import ContextOverflow, UsageError
from runner.engine.protocol import Engine, GenerationChunk, GenerationStats, Message, Sampling

Overflow = Literal["drop", "shift", "error"]
"""What happens when a conversation outgrows the context: its oldest turns are left out; the same, and a reply that
reaches the end goes on without the oldest tokens; or it is refused."""

_REPLY_ROOM = 512
"""Tokens that are kept free for a reply, if it may be as long and the context has four times as many."""
_TEMPLATE_ROOM = 128
"""Tokens that a template may write around one message."""


class ChatSession:
    """One conversation with an engine. `sampling` may be replaced between turns; None is the model's own.

    `messages` is all that was said. What no longer fits the context is left out of what the model is given, and
    `notify` hears of it in a line. `keep` is given all of them after every turn, also one that was broken off.
    """

    def __init__(
        self,
        engine: Engine,
        system: str | None = None,
        sampling: Sampling | None = None,
        *,
        overflow: Overflow = "drop",
        notify: Callable[[str], None] = lambda text: None,
        keep: Callable[[Sequence[Message]], None] = lambda messages: None,
    ) -> None:
        self.engine = engine
        self.sampling = sampling or engine.default_sampling
        self.messages: list[Message] = []
        self.last_stats = GenerationStats()
        self.notify = notify
        self._keep = keep
        self._overflow = overflow
        self._left_out = self._used = self._at_most = 0
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
        self._at_most += len((text or "").encode())

    def resume(self, messages: Sequence[Message]) -> None:
        """Go on with another conversation in place of this one."""
        self.messages = list(messages)
        self.last_stats = GenerationStats()
        self._left_out = self._used = 0
        self._at_most = sum(len(message.content.encode()) + _TEMPLATE_ROOM for message in messages)

    def clear(self) -> None:
        """Forget the turns; the system message stays."""
        self.resume([message for message in self.messages if message.role == "system"])

    def undo(self) -> str:
        """Take back the last message and its reply; the message. Raises UsageError where there is none."""
        last = max((i for i, message in enumerate(self.messages) if message.role == "user"), default=None)
        if last is None:
            raise UsageError("there is nothing to take back")
        text = self.messages[last].content
        del self.messages[last:]
        self._left_out = min(self._left_out, len(self._turns()) // 2 * 2)
        return text

    def retry(self) -> Iterator[GenerationChunk]:
        """Have the last message answered once more; as `reply`. Raises UsageError where there is none."""
        return self.reply(self.undo())

    def reply(self, text: str) -> Iterator[GenerationChunk]:
        """Say `text` and give out the reply as it comes.

        What came of a reply that was cancelled, interrupted or failed stays in the conversation, without the thought
        before it. Where nothing came, `text` is taken back too, so that it can be said again. Raises TemplateError,
        GenerationError and, when the conversation cannot be made to fit the context, ContextOverflow.
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
                if chunk.thinking:  # templates leave thoughts out of what was said before, and so does this
                    tokens.clear()
                elif chunk.token is not None:
                    tokens.append(chunk.token)
                self.last_stats = chunk.stats
                # the last token of a full context was picked, but takes no place in it any more
                self._used = min(chunk.stats.prompt_tokens + chunk.stats.generated_tokens, self.engine.info.n_ctx)
                self._at_most = self._used
                complete = chunk.finish_reason not in (None, "cancelled")
                if chunk.finish_reason is not None:
                    # Kept before the last chunk goes out: nobody has to ask for more to have it.
                    self._end_turn(before, pieces, tokens, complete)
                if chunk.notice:
                    self.notify(chunk.notice)
                yield chunk
        except BaseException:
            self._end_turn(before, pieces, tokens, complete)
            raise
        finally:
            chunks.close()  # the engine is free again, whatever still holds this frame

    def _generate(self) -> Generator[GenerationChunk, None, None]:
        shift = self._overflow == "shift"
        yield from self.engine.chat(self._fitting(), self.sampling, shift=shift)

    def _turns(self) -> list[Message]:
        return [message for message in self.messages if message.role != "system"]

    def _fitting(self) -> list[Message]:
        """The messages that the model is given: all, or without the oldest turns where they do not fit."""
        system = [message for message in self.messages if message.role == "system"]
        turns = self._turns()
        n_ctx = self.engine.info.n_ctx
        room = min(self.sampling.max_tokens or _REPLY_ROOM, _REPLY_ROOM, n_ctx // 4)
        # A token has a byte at least: what is short for certain need not be counted.
        if not self._left_out and self._at_most + len(turns[-1].content.encode()) + _TEMPLATE_ROOM + room <= n_ctx:
            return self.messages

        def count() -> int:
            return len(self.engine.encode_chat([*system, *turns[self._left_out :]], think=self.sampling.think))

        before, first = count(), self._left_out
        now, wanted = before, n_ctx - room
        if now > wanted:
            if self._overflow == "error":
                raise ContextOverflow(
                    f"the conversation has {now} tokens, a reply needs {room}, and the context holds {n_ctx}",
                    hint="/clear starts over, --context N gives more room, --overflow drop leaves out old turns",
                    prompt_tokens=now,
                    n_ctx=n_ctx,
                )
            wanted -= n_ctx // 4  # so that not every turn leaves one out, and has the rest computed again
        while now > wanted and self._left_out + 2 < len(turns):
            self._left_out += 2
            now = count()
        if self._left_out > first:
            n, oldest = (self._left_out - first) // 2, turns[first].content.split("\n")[0][:40]
            turns_said = "the oldest turn is" if n == 1 else f"the {n} oldest turns are"
            self.notify(f"the context is full: {turns_said} left out ({before - now} tokens, from {oldest!r} on)")
        if now > n_ctx:
            self._left_out = first
            raise ContextOverflow(
                f"the message has {now} tokens, with what the template adds, and the context holds {n_ctx}",
                hint=f"shorten it, or make room: --context {now + room}; /clear starts over",
                prompt_tokens=now,
                n_ctx=n_ctx,
            )
        return [*system, *turns[self._left_out :]]

    def _end_turn(self, before: int, pieces: list[str], tokens: list[int], complete: bool) -> None:
        """End the turn that began at `before`; calling it again changes nothing."""
        if len(self.messages) != before + 1:
            return
        if tokens or complete:
            self.messages.append(Message("assistant", "".join(pieces), tuple(tokens)))
            self._keep(self.messages)
        else:
            del self.messages[before:]
