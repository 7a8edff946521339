"""One reply: the prompt is computed as far as it is not held, then tokens are picked and computed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from models.native import ATTR_USER_DEFINED, Vocabulary
from runner.engine.context import Cancelled, Context
from runner.engine.logprobs import token_logprobs
from runner.engine.protocol import FinishReason, GenerationChunk, GenerationStats, Sampling, TokenLogprobs
from runner.engine.sampler import Sampler
from runner.engine.speculation import Draft, Speculation
from runner.engine.stops import StopFilter
from runner.engine.text_stream import TextStream
from runner.thinking import ThoughtFilter, ThoughtMarks

QUICK = 0.15
"""Seconds. Ctrl-C can wait for a step that takes less."""

Run = Callable[[Callable[[], Any]], Any]
"""Runs a piece of the computation while nothing else may."""


@dataclass(frozen=True)
class Thinking:
    """What a reply's thought looks like in tokens."""

    marks: ThoughtMarks
    inside: bool
    """Whether the prompt has opened the thought."""
    shown: frozenset[int]
    """Tokens of the marks that have no text otherwise."""
    opening: int | None
    """The token that a thought begins with, if no answer can begin with it."""
    closing: Sequence[int]


def thinking_after(tokens: Sequence[int], marks: ThoughtMarks | None, vocabulary: Vocabulary) -> Thinking | None:
    """How a thought looks in the reply to the prompt `tokens`; None for a model that has none."""
    if marks is None:
        return None
    ids = {
        mark: vocabulary.tokenize(mark, add_special=False, parse_special=True)
        for mark in (marks.opens, marks.closes, marks.answers, marks.closes + marks.after)
        if mark
    }
    control = {token for row in ids.values() for token in row if not vocabulary.piece(token)}
    end = b"".join(vocabulary.piece(token, special=True) for token in tokens[-16:]).rstrip()
    first = ids[marks.opens][0]
    own = first in control or vocabulary.attributes(first) & ATTR_USER_DEFINED
    return Thinking(
        marks,
        inside=end.endswith(marks.opens.rstrip().encode()),
        shown=frozenset(control),
        opening=first if own else None,
        closing=ids[marks.closes + marks.after],
    )


@dataclass(frozen=True)
class Request:
    """What is to be continued."""

    tokens: Sequence[int]
    sampling: Sampling
    marks: Collection[int] = ()
    """Places in `tokens` where later requests may part from this one."""
    shift_after: int | None = None
    """With a full context go on without the oldest tokens after so many; None: the reply ends."""
    thinking: Thinking | None = None
    given: Sequence[int] = ()
    """Tokens of the reply that were picked and given out before, by an engine that is lost."""


def reply(
    context: Context,
    vocabulary: Vocabulary,
    recall: Callable[[Sequence[int]], int],
    speculation: Speculation | None,
    request: Request,
    run: Run,
) -> Generator[GenerationChunk, None, None]:
    """The chunks of a reply. Raises GenerationError.

    `recall` brings the context near the prompt and says how many of its tokens are held then.
    """
    sampling, thinking = request.sampling, request.thinking
    tokens, shifted = _within(context.n_ctx, request)
    stats = GenerationStats(prompt_tokens=len(request.tokens), shifted_tokens=shifted)
    finish: FinishReason = "stop"
    stream, stops = TextStream(), StopFilter(sampling.stop)
    thoughts = ThoughtFilter(thinking.marks, inside=thinking.inside) if thinking else ThoughtFilter(None)

    def prefill() -> int:
        held = recall(tokens)
        context.extend(tokens[held:], {*request.marks, len(tokens) - 1})
        return held

    def chunk_of(token: int, piece: bytes) -> GenerationChunk:
        nonlocal stats
        was_inside = thoughts.inside
        thought, answer = thoughts.feed(stream.feed(piece))
        stats = replace(
            stats,
            generated_tokens=stats.generated_tokens + 1,
            thought_tokens=stats.thought_tokens + (was_inside and thoughts.inside),
        )
        if not (thoughts.inside or thoughts.undecided):
            sampler.constrained = True
        return GenerationChunk(
            stops.feed(answer),
            token,
            stats,
            logprobs=steps.logprobs,
            thought=thought,
            thinking=thoughts.thinking,
        )

    with closing(run(lambda: Sampler(sampling, vocabulary, request.tokens))) as sampler:
        steps = Steps(context, vocabulary, sampler, speculation, run, sampling.logprobs)
        sampler.begin(thoughts.inside, thinking.opening if thinking and thoughts.undecided else None)
        began = time.perf_counter()
        try:
            cached = run(prefill)
            stats = replace(stats, cached_tokens=cached, prefill_seconds=time.perf_counter() - began)
            steps.begin(tokens)
            began = time.perf_counter()
            shown = thinking.shown if thinking else ()
            for token in request.given:  # its text has gone out
                chunk_of(token, steps.repeat(token, shown))
            picked: int | None = None
            while True:
                if stats.generated_tokens:
                    if stops.stopped:
                        break
                    if context.abort_requested:
                        raise Cancelled
                    left = None if sampling.max_tokens is None else sampling.max_tokens - stats.generated_tokens
                    if left != 0 and steps.held >= context.n_ctx and request.shift_after is not None:
                        gone = steps.make_room(request.shift_after)
                        stats = replace(stats, shifted_tokens=stats.shifted_tokens + gone)
                    if left == 0 or steps.held >= context.n_ctx:
                        finish = "length"
                        break
                    if picked is not None:
                        steps.compute(picked, left)
                budget = sampling.think_budget
                if thinking and thoughts.inside and budget is not None and stats.thought_tokens >= budget:
                    steps.force(thinking.closing)
                picked, piece = steps.pick(shown)
                stats = steps.counted(replace(stats, generate_seconds=stats.generate_seconds + _since(began)))
                if piece is None:
                    break
                yield chunk_of(picked, piece)
                began = time.perf_counter()
        except Cancelled:
            finish = "cancelled"
        steps.settle()
        thought, answer = thoughts.flush()
        yield GenerationChunk(stops.feed(answer) + stops.flush(), None, stats, finish, thought=thought)


def _within(n_ctx: int, request: Request) -> tuple[Sequence[int], int]:
    """The tokens to compute before the first is picked, and how many of the oldest are not among them."""
    tokens = [*request.tokens, *request.given]
    if len(tokens) <= n_ctx or request.shift_after is None:
        return tokens[:n_ctx], 0
    keep = request.shift_after
    newest = tokens[-(n_ctx - keep) // 2 :]
    return [*tokens[:keep], *newest], len(tokens) - keep - len(newest)


def _since(began: float) -> float:
    return time.perf_counter() - began


class Steps:
    """Picks tokens, and computes what follows them: one at a time, or with drafted ones that may turn out right."""

    def __init__(
        self,
        context: Context,
        vocabulary: Vocabulary,
        sampler: Sampler,
        speculation: Speculation | None,
        run: Run,
        n_logprobs: int | None,
    ) -> None:
        self._context, self._vocabulary, self._sampler, self._run = context, vocabulary, sampler, run
        self._n_logprobs = n_logprobs
        self.logprobs: TokenLogprobs | None = None
        """Of the token picked last, where they are asked for."""
        self._speculation = speculation
        self._draft = Draft()
        self._right = 0
        self._row = -1
        self._seconds = QUICK
        self._drafted = self._accepted = 0
        self._forced: list[int] = []

    def begin(self, tokens: Sequence[int]) -> None:
        if self._speculation is not None:
            self._speculation.begin(tokens)

    @property
    def held(self) -> int:
        """Tokens of the context that are certain."""
        return len(self._context.held) - len(self._draft.tokens) + self._right

    def counted(self, stats: GenerationStats) -> GenerationStats:
        return replace(stats, drafted_tokens=self._drafted, accepted_tokens=self._accepted)

    def force(self, tokens: Sequence[int]) -> None:
        """Let these come next, whatever the model would say."""
        self._forced = self._forced or list(tokens)

    def pick(self, shown: Collection[int] = ()) -> tuple[int, bytes | None]:
        """The next token, and its bytes: None for one that ends the reply. Those of `shown` have their text too."""
        token, piece = self._run(lambda: self._pick(shown))
        if self._speculation is not None:
            self._speculation.add(token)
        return token, piece

    def _pick(self, shown: Collection[int]) -> tuple[int, bytes | None]:
        logits = self._context.logits(self._row)
        if self._forced:
            token = self._forced.pop(0)
            self._sampler.accept(token)
        elif self._sampler.is_plain:
            token = int(logits.argmax())
        else:
            token = self._sampler.sample(self._context.pointer, self._row)
        if self._n_logprobs is not None:
            self.logprobs = token_logprobs(logits, token, self._n_logprobs)
        if token in shown:
            return token, self._vocabulary.piece(token, special=True)
        return token, None if self._vocabulary.is_eog(token) else self._vocabulary.piece(token)

    def repeat(self, token: int, shown: Collection[int]) -> bytes:
        """Count a token as picked that was before, and is computed already; its bytes."""
        self._sampler.repeat(token)
        return self._vocabulary.piece(token, special=token in shown)

    def compute(self, token: int, left: int | None) -> None:
        """Make the logits of what follows `token` ready; at most `left` more are wanted. Raises Cancelled."""
        if self._right < len(self._draft.tokens) and self._draft.tokens[self._right] == token:
            self._right += 1
            self._accepted += 1
            self._row = self._right
            return
        self.settle()
        room = min(self._context.n_ctx - len(self._context.held) - 1, self._context.most_drafted)
        draft = (
            Draft()
            if self._speculation is None
            else self._speculation.draft(room if left is None else min(room, left))
        )
        slow = self._seconds >= QUICK
        began = time.perf_counter()
        batch = [token, *draft.tokens]
        self._run(lambda: self._context.advance(batch, interruptible=slow))
        self._seconds = _since(began)
        self._draft, self._right, self._row = draft, 0, 0
        self._drafted += len(draft.tokens)
        if self._speculation is not None and not draft.tokens:
            self._speculation.learn(draft, 0, self._seconds)

    def make_room(self, keep: int) -> int:
        """Let the older half of what comes after the first `keep` tokens go; how many that were."""
        self.settle()
        n = (len(self._context.held) - keep) // 2
        return n if self._run(lambda: self._context.shift(keep, n)) else 0

    def settle(self) -> None:
        """Take back what was drafted and did not come."""
        draft, self._draft = self._draft, Draft()
        if not draft.tokens:
            return
        right, self._right = self._right, 0
        self._run(lambda: self._context.truncate(len(self._context.held) - len(draft.tokens) + right))
        if self._speculation is not None:
            self._speculation.learn(draft, right, self._seconds)
