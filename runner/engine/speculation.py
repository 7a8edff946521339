"""More than one token at a time: tokens are drafted, and computed together with the one that is certain.

A drafted token stays only if it is the one that the sampler picks from the checked logits, so nothing changes but the
time. How many are worth drafting follows from what was measured: the time of a batch of n against the chance, seen so
far, that a draft of this kind is right. Where none pays, none is drafted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from runner.engine.context_params import MOST_OUTPUTS

MOST_DRAFTED = MOST_OUTPUTS - 1
WORTH = 1.05
"""How many times plain generation a draft must promise: what is measured is noisy."""
_LONGEST_PAUSE = 64
_NEW_SECONDS, _NEW_CHANCE = 0.25, 0.06
"""The weight of a new measurement against those before."""


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next. `kinds` tells alike those whose chances are alike (see `Chances`)."""

    tokens: Sequence[int] = ()
    kinds: Sequence[int] = ()


class Drafter(Protocol):
    """Something that guesses how a text goes on."""

    @property
    def priors(self) -> Sequence[float]:
        """The chance of each kind of guess, before anything was seen."""
        ...

    @property
    def seconds_each(self) -> float:
        """What guessing one token takes."""
        ...

    def begin(self, tokens: Sequence[int]) -> None:
        """A text of these tokens is to be continued."""
        ...

    def add(self, token: int) -> None:
        """The text goes on with this one."""
        ...

    def draft(self, most: int) -> Draft: ...

    def close(self) -> None: ...


class BatchSeconds:
    """How long a batch of n tokens takes, as measured; in between and beyond, along straight lines."""

    def __init__(self, slope: float) -> None:
        self._slope = slope
        self._seen: dict[int, float] = {}

    def learn(self, n: int, seconds: float) -> None:
        before = self._seen.get(n, seconds)
        # A pause of the machine says nothing of the next batch.
        seconds = min(seconds, 2 * before)
        self._seen[n] = before + _NEW_SECONDS * (seconds - before)

    def of(self, n: int) -> float | None:
        """None while one token alone was never measured."""
        one = self._seen.get(1)
        if one is None or n in self._seen:
            return self._seen.get(n)
        below = max(k for k in self._seen if k < n)
        above = min((k for k in self._seen if k > n), default=None)
        low = self._seen[below]
        if above is not None:
            return low + (self._seen[above] - low) * (n - below) / (above - below)
        slope = (low - one) / (below - 1) if below > 1 else self._slope * one
        return low + max(slope, 0.0) * (n - below)


@dataclass
class Chances:
    """How often a guess of each kind was right."""

    values: list[float]

    def learn(self, kind: int, right: bool) -> None:
        self.values[kind] += _NEW_CHANCE * (right - self.values[kind])


@dataclass
class Speculation:
    """Decides how much of each draft is worth computing. Lives as long as the engine: what it learnt holds on."""

    drafter: Drafter
    seconds: BatchSeconds
    _chances: Chances = field(init=False)
    _pause: int = 0
    _waits: int = 0
    _unused: Draft = field(default_factory=Draft)

    def __post_init__(self) -> None:
        self._chances = Chances(list(self.drafter.priors))

    def begin(self, tokens: Sequence[int]) -> None:
        self.drafter.begin(tokens)
        self._unused = Draft()
        self._pause = self._waits = 0

    def draft(self, most: int) -> Draft:
        """Tokens to compute after the one that is certain; often none."""
        if self._waits:
            self._waits -= 1
            return Draft()
        draft = self.drafter.draft(min(most, MOST_DRAFTED, self._worth_asking_for()))
        n = self._best_length(draft)
        if self.drafter.seconds_each:
            # To be told what is not worth computing costs time too: it is asked for ever more rarely.
            self._pause = 0 if n else min(max(2 * self._pause, 1), _LONGEST_PAUSE)
            self._waits = self._pause
        self._unused = draft if n == 0 else Draft()
        return Draft(draft.tokens[:n], draft.kinds[:n])

    def learn(self, draft: Draft, accepted: int, seconds: float) -> None:
        """`accepted` of the drafted tokens were right, and computing the batch took `seconds`."""
        self.seconds.learn(1 + len(draft.tokens), seconds)
        for i, kind in enumerate(draft.kinds[: accepted + 1]):
            self._chances.learn(kind, i < accepted)

    def add(self, token: int) -> None:
        """`token` came next. What was drafted and not computed is judged by it, which costs nothing."""
        if self._unused.tokens:
            self._chances.learn(self._unused.kinds[0], self._unused.tokens[0] == token)
            self._unused = Draft()
        self.drafter.add(token)

    def _worth_asking_for(self) -> int:
        """How many guesses pay if all are of the surest kind."""
        if not self.drafter.seconds_each:
            return MOST_DRAFTED
        surest = len(self._chances.values) - 1
        return max(self._best_length(Draft([0] * MOST_DRAFTED, [surest] * MOST_DRAFTED)), 1)

    def _best_length(self, draft: Draft) -> int:
        one = self.seconds.of(1)
        if one is None:
            return 0
        best, best_rate = 0, WORTH / one
        expected, chance = 1.0, 1.0
        for n, kind in enumerate(draft.kinds, start=1):
            chance *= self._chances.values[kind]
            expected += chance
            seconds = self.seconds.of(n + 1)
            assert seconds is not None
            rate = expected / (seconds + n * self.drafter.seconds_each)
            if rate > best_rate:
                best, best_rate = n, rate
        return best
