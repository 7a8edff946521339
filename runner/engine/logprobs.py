"""How sure a model was: log probabilities out of logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runner.engine.protocol import TokenLogprobs


def token_logprobs(logits: NDArray[np.float32], token: int, n: int) -> TokenLogprobs:
    """Of `token` and of the `n` best tokens, from logits [n_vocab] before any sampler; natural logarithms."""
    highest = float(logits.max())
    total = highest + float(np.log(np.exp(logits.astype(np.float64) - highest).sum()))
    n = min(n, len(logits))
    found = np.argpartition(logits, -n)[-n:].tolist() if n else []
    best = sorted(found, key=lambda i: (-logits[i], i))
    return TokenLogprobs(float(logits[token]) - total, tuple((i, float(logits[i]) - total) for i in best))
