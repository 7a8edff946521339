"""Drafting by a second, smaller model of the same vocabulary."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from models import native
from models.errors import LoadError
from models.native import Vocabulary
from runner.engine.context import Context, Memory
from runner.engine.speculation import Draft

PRIORS = (0.3, 0.5, 0.7, 0.85, 0.95)
_LIMITS = (0.4, 0.6, 0.8, 0.95)
"""A guess to which the model gives less than each of these is of one kind; surer ones are of the last."""
_NEW_SECONDS = 0.25


class DraftModel:
    """The tokens that a small model finds likeliest, for as long as it is sure of them.

    `model` and `context` are its own from here on: call `close`. Raises LoadError where its tokens are others than
    those of `vocabulary`, or what it computed cannot be taken back.
    """

    priors = PRIORS

    def __init__(self, name: str, model: object, context: Context, own: Vocabulary, vocabulary: Vocabulary) -> None:
        self._model, self._context = model, context
        self._tokens: list[int] = []
        self.seconds_each = 0.0
        if context.memory is Memory.STATE:
            raise LoadError(f"{name} cannot draft: it is recurrent, and a wrong guess could not be taken back")
        other = own.n_tokens if own.n_tokens != vocabulary.n_tokens else _first_difference(own, vocabulary)
        if other is not None:
            raise LoadError(
                f"{name} cannot draft for this model: their vocabularies differ (at token {other})",
                hint="--draft takes a smaller model of the same family",
            )

    def begin(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)
        self._context.clear_abort()

    def add(self, token: int) -> None:
        self._tokens.append(token)

    def draft(self, most: int) -> Draft:
        context = self._context
        most = min(most, context.n_ctx - len(self._tokens))
        if most < 1:
            return Draft()
        held = context.reuse(self._tokens)
        context.extend(self._tokens[held:])
        draft, self.seconds_each = guess_on(
            lambda tokens: context.logits(0 if tokens else -1),
            lambda token: context.advance([token], interruptible=True),
            most,
            self.seconds_each,
        )
        return draft

    def close(self) -> None:
        self._context.close()
        native.library().llama_model_free(self._model)


def guess_on(
    logits_after: Callable[[Sequence[int]], NDArray[np.float32]],
    compute: Callable[[int], None],
    most: int,
    seconds_each: float,
) -> tuple[Draft, float]:
    """The likeliest tokens one after another, at most `most`, as long as the model is sure; and the seconds for each.

    `logits_after` gives those that follow the guesses so far, once `compute` has had the last of them.
    """
    tokens: list[int] = []
    kinds: list[int] = []
    began = time.perf_counter()
    while True:
        logits = logits_after(tokens)
        token = int(logits.argmax())
        chance = 1 / float(np.exp(logits - logits[token]).sum())
        if chance < _LIMITS[0]:
            break
        tokens.append(token)
        kinds.append(sum(chance >= limit for limit in _LIMITS))
        if len(tokens) == most:
            break
        compute(token)
    seconds = (time.perf_counter() - began) / max(len(tokens), 1)
    return Draft(tokens, kinds), seconds_each + (_NEW_SECONDS if seconds_each else 1.0) * (seconds - seconds_each)


def _first_difference(one: Vocabulary, other: Vocabulary) -> int | None:
    return next((token for token in range(one.n_tokens) if one.text(token) != other.text(token)), None)
