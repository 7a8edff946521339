"""How the next token is picked: llama.cpp's samplers, in llama.cpp's order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from models import native
from runner.engine.protocol import Sampling

PENALTY_WINDOW = 64
"""Tokens that the repeat penalty looks back on."""

_GREEDY_BELOW = 1e-6
_SEED_BITS = 0xFFFF_FFFF


class Sampler:
    """A sampler chain. Owns its C object: call `close`."""

    def __init__(self, sampling: Sampling, vocabulary_size: int, prompt: Sequence[int]) -> None:
        lib = native.library()
        self._lib = lib
        self._chain: Any = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        penalized = sampling.repeat_penalty > 0 and sampling.repeat_penalty != 1.0
        if penalized:
            self._add(
                lib.llama_sampler_init_penalties(vocabulary_size, PENALTY_WINDOW, sampling.repeat_penalty, 0.0, 0.0)
            )
        if sampling.temperature < _GREEDY_BELOW:
            self._add(lib.llama_sampler_init_greedy())
        else:
            self._add(lib.llama_sampler_init_top_k(sampling.top_k))
            self._add(lib.llama_sampler_init_top_p(sampling.top_p, 1))
            self._add(lib.llama_sampler_init_min_p(sampling.min_p, 1))
            self._add(lib.llama_sampler_init_temp(sampling.temperature))
            random = lib.LLAMA_DEFAULT_SEED
            self._add(lib.llama_sampler_init_dist(random if sampling.seed is None else sampling.seed & _SEED_BITS))
        if penalized:
            for token in prompt[-PENALTY_WINDOW:]:
                lib.llama_sampler_accept(self._chain, token)

    def _add(self, sampler: Any) -> None:
        self._lib.llama_sampler_chain_add(self._chain, sampler)

    def sample(self, context: Any, index: int = -1) -> int:
        """The next token, from the logits of one of the tokens decoded last (-1: of the last)."""
        token: int = self._lib.llama_sampler_sample(self._chain, context, index)
        return token

    def close(self) -> None:
        chain, self._chain = self._chain, None
        if chain:
            self._lib.llama_sampler_free(chain)


def recommended_sampling(metadata: Mapping[str, str]) -> Sampling:
    """What the model's own `general.sampling.*` keys ask for; what they leave out or garble stays default."""
    default = Sampling()

    def number(key: str, fallback: float, low: float, high: float) -> float:
        try:
            value = float(metadata[f"general.sampling.{key}"])
        except (KeyError, ValueError):
            return fallback
        # f32 in the file: 0.7 reads as 0.699999988
        return round(value, 6) if math.isfinite(value) and low <= value <= high else fallback

    return Sampling(
        temperature=number("temp", default.temperature, 0.0, 10.0),
        top_k=int(number("top_k", default.top_k, 0, 1 << 20)),
        top_p=number("top_p", default.top_p, 0.0, 1.0),
        min_p=number("min_p", default.min_p, 0.0, 1.0),
        repeat_penalty=number("penalty_repeat", default.repeat_penalty, 0.1, 10.0),
    )
