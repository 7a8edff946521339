"""Conversations that were left: memories kept aside, so that going back to one computes nothing twice.

Every kind of memory is kept in the same way, as a copy. Sequences beside each other in one cache would spare the copy
for those that can be cut, but cost every token of one branch the sight of the others' cells.
"""

from __future__ import annotations

from collections.abc import Sequence

from runner.engine.context import Context
from runner.engine.snapshots import Snapshot

WORTH_KEEPING = 64
"""Tokens. Fewer are computed again as quickly as the memory of a long conversation is copied."""
MOST_KEPT = 32
"""Every one of them is looked at for every request."""
NO_TOKEN = -1
"""After all that a memory holds it stands for whatever comes next: what is kept must be able to go on from there."""


class Branches:
    """The memories that `context` left, the least recently used first, within `limit` bytes."""

    def __init__(self, context: Context, limit: int) -> None:
        self._context = context
        self._limit = limit
        self._kept: list[Snapshot] = []

    def switch(self, tokens: Sequence[int]) -> int:
        """Bring the context as near to the beginning of `tokens` as anything kept is; how many tokens it holds then.

        What the context loses by that is kept aside, if it is worth it.
        """
        context = self._context
        here = context.keepable(tokens)
        best = max(self._kept, key=lambda kept: context.keepable_of(kept, tokens), default=None)
        if best is not None and context.keepable_of(best, tokens) >= here + WORTH_KEEPING:
            self._kept.remove(best)
            self._keep_aside(here)
            if not context.restore(best):
                return 0
        else:
            self._keep_aside(here)
        return context.reuse(tokens)

    def take(self, snapshot: Snapshot, tokens: Sequence[int]) -> int:
        """Go on from a memory that was kept elsewhere, if it is of use to this context."""
        self._keep_aside(0)
        return self._context.reuse(tokens) if self._context.restore(snapshot) else 0

    def _keep_aside(self, remaining: int) -> None:
        context = self._context
        if len(context.held) - remaining < WORTH_KEEPING or context.snapshot_bytes() > self._limit:
            return
        if any(self._serves(kept, context.held) for kept in self._kept):
            return
        if (snapshot := context.snapshot()) is None:
            return
        self._kept = [kept for kept in self._kept if not self._serves(snapshot, kept.tokens)]
        self._kept.append(snapshot)
        while len(self._kept) > MOST_KEPT or sum(kept.nbytes for kept in self._kept) > self._limit:
            del self._kept[0]

    def _serves(self, snapshot: Snapshot, held: Sequence[int]) -> bool:
        """Whether a copy makes another of the memory that holds `held` needless."""
        return self._context.keepable_of(snapshot, [*held, NO_TOKEN]) == len(held)
