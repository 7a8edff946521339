"""How the next token is picked: llama.cpp's samplers, in llama.cpp's order, within a grammar where one is given."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from models import native
from models.errors import UsageError
from models.native import Vocabulary
from runner.engine.constraint import Constraint
from runner.engine.protocol import Sampling
from runner.engine.recommended import check_sampling

_GREEDY_BELOW = 1e-6
_RANDOM = 0xFFFF_FFFF
"""LLAMA_DEFAULT_SEED: llama.cpp takes another seed each time."""
_UNDERFLOW = 1e-30
"""Of the best token's probability: what is below becomes 0, and the samplers that take logarithms sort by NaN."""
_MIROSTAT_M = 100
_KEEP = 1


class Sampler:
    """A sampler chain and perhaps a grammar. Owns its C objects: call `close`.

    Raises UsageError for a value that no sampler can work with, and for a grammar that cannot be used.
    """

    def __init__(self, sampling: Sampling, vocabulary: Vocabulary, prompt: Sequence[int] = ()) -> None:
        check_sampling(sampling)
        self._lib = native.library()
        self._chain: Any = None
        self._constraint = Constraint(sampling.grammar, vocabulary) if sampling.grammar is not None else None
        self.constrained = True
        """Whether the grammar is in force: not while a model thinks. Without a grammar it means nothing."""
        self._opening: int | None = None
        try:
            self._chain = self._lib.llama_sampler_chain_init(self._lib.llama_sampler_chain_default_params())
            parts = _samplers(self._lib, sampling, vocabulary)
            self.is_plain = _is_greedy(sampling) and len(parts) == 1 and self._constraint is None
            """Whether the highest logit is always the one to pick: no chain is needed to find it."""
            for sampler in parts:
                self._lib.llama_sampler_chain_add(self._chain, sampler)
        except BaseException:
            self.close()
            raise
        window = max(sampling.penalty_last_n if _is_penalized(sampling) else 0, _dry_window(sampling))
        for token in prompt[-window:] if window else ():
            self._lib.llama_sampler_accept(self._chain, token)

    def begin(self, thinking: bool, opening: int | None) -> None:
        """A reply begins: within a thought, for which the grammar is not, or perhaps with the token that opens one."""
        self.constrained, self._opening = not thinking, opening

    def sample(self, context: Any, index: int = -1) -> int:
        """The next token, from output row `index` of the last batch of a `llama_context *`; it counts as said.

        Raises GenerationError where the grammar allows none.
        """
        if self._constraint is None or not self.constrained:
            token: int = self._lib.llama_sampler_sample(self._chain, context, index)
            return token
        token = self._constraint.pick(self._chain, context, index, self._opening)
        self.repeat(token)
        return token

    def repeat(self, token: int) -> None:
        """Count a token as picked: by `sample`, or for the same reply in an engine that is lost."""
        if self._constraint is not None and self.constrained:
            self.constrained = token != self._opening
            self._opening = None
            if self.constrained:
                self._constraint.accept(token)
        self.accept(token)

    def accept(self, token: int) -> None:
        """Count a token as said that was not picked here, and that no grammar looks at."""
        self._lib.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        chain, self._chain = self._chain, None
        if chain:
            self._lib.llama_sampler_free(chain)
        if self._constraint is not None:
            self._constraint.close()


def _is_greedy(s: Sampling) -> bool:
    return s.temperature < _GREEDY_BELOW and s.dynatemp_range <= 0


def _is_penalized(s: Sampling) -> bool:
    return s.repeat_penalty != 1.0 or s.frequency_penalty != 0.0 or s.presence_penalty != 0.0


def _dry_window(s: Sampling) -> int:
    return s.dry_last_n if s.dry_multiplier > 0 else 0


def _samplers(lib: Any, s: Sampling, vocabulary: Vocabulary) -> list[Any]:
    """The chain's parts. Those that would do nothing are left out: some walk through the whole vocabulary for it."""
    seed = _RANDOM if s.seed is None else s.seed
    bias = _logit_bias(lib, s, vocabulary)
    first = [bias] if bias is not None else []
    if _is_greedy(s):
        # The best one, after what changes which one is the best.
        names = [name for name in s.samplers if name in ("penalties", "dry")]
        last = [lib.llama_sampler_init_greedy()]
    elif s.mirostat:
        names = []
        last = [lib.llama_sampler_init_temp(s.temperature), lib.llama_sampler_init_min_p(_UNDERFLOW, _KEEP)]
        if s.mirostat == 1:
            n = vocabulary.n_tokens
            last.append(lib.llama_sampler_init_mirostat(n, seed, s.mirostat_tau, s.mirostat_eta, _MIROSTAT_M))
        else:
            last.append(lib.llama_sampler_init_mirostat_v2(seed, s.mirostat_tau, s.mirostat_eta))
    else:
        names = list(s.samplers)
        last = [lib.llama_sampler_init_dist(seed)]
    middle = [part for name in names for part in _BUILDERS[name](lib, s, vocabulary, seed)]
    return [*first, *middle, *last]


def _logit_bias(lib: Any, s: Sampling, vocabulary: Vocabulary) -> Any:
    """The bias that was asked for, and the model's own list of tokens never to be picked; None without either."""
    for token, _ in s.logit_bias:
        if not 0 <= token < vocabulary.n_tokens:
            raise UsageError(
                f"logit_bias names token {token}, and the vocabulary has {vocabulary.n_tokens}", option="logit_bias"
            )
    count = ctypes.c_int32(0)
    suppressed = lib.llama_vocab_get_suppress_tokens(vocabulary.pointer, ctypes.byref(count))
    never = [suppressed[i] for i in range(count.value)] if suppressed else []
    entries = [*s.logit_bias, *((token, float("-inf")) for token in never if 0 <= token < vocabulary.n_tokens)]
    if not entries:
        return None
    array = (lib.llama_logit_bias * len(entries))(*(lib.llama_logit_bias(token, bias) for token, bias in entries))
    return lib.llama_sampler_init_logit_bias(vocabulary.n_tokens, len(entries), array)


Builder = Callable[[Any, Sampling, Vocabulary, int], list[Any]]


def _penalties(lib: Any, s: Sampling, vocabulary: Vocabulary, seed: int) -> list[Any]:
    if not _is_penalized(s) or not s.penalty_last_n:
        return []
    penalties = (s.repeat_penalty, s.frequency_penalty, s.presence_penalty)
    return [lib.llama_sampler_init_penalties(vocabulary.n_tokens, s.penalty_last_n, *penalties)]


def _dry(lib: Any, s: Sampling, vocabulary: Vocabulary, seed: int) -> list[Any]:
    if not _dry_window(s):
        return []
    breakers = [text.encode("utf-8", "replace") for text in s.dry_breakers]
    array = (ctypes.c_char_p * len(breakers))(*breakers)
    settings = (s.dry_multiplier, s.dry_base, s.dry_allowed_length, s.dry_last_n)
    return [lib.llama_sampler_init_dry(vocabulary.pointer, *settings, array, len(breakers))]


def _typical(lib: Any, s: Sampling, vocabulary: Vocabulary, seed: int) -> list[Any]:
    if s.typical_p >= 1:
        return []
    return [
        lib.llama_sampler_init_min_p(_UNDERFLOW, _KEEP),
        lib.llama_sampler_init_typical(s.typical_p, _KEEP),
    ]


def _xtc(lib: Any, s: Sampling, vocabulary: Vocabulary, seed: int) -> list[Any]:
    if s.xtc_probability <= 0:
        return []
    return [lib.llama_sampler_init_xtc(s.xtc_probability, s.xtc_threshold, _KEEP, seed)]


def _temperature(lib: Any, s: Sampling, vocabulary: Vocabulary, seed: int) -> list[Any]:
    return [lib.llama_sampler_init_temp_ext(s.temperature, s.dynatemp_range, s.dynatemp_exponent)]


_BUILDERS: Mapping[str, Builder] = {
    "penalties": _penalties,
    "dry": _dry,
    "top_n_sigma": lambda lib, s, _, __: (
        [lib.llama_sampler_init_top_n_sigma(s.top_n_sigma)] if s.top_n_sigma > 0 else []
    ),
    "top_k": lambda lib, s, _, __: [lib.llama_sampler_init_top_k(s.top_k)] if s.top_k else [],
    "typ_p": _typical,
    "top_p": lambda lib, s, _, __: [lib.llama_sampler_init_top_p(s.top_p, _KEEP)] if s.top_p < 1 else [],
    "min_p": lambda lib, s, _, __: [lib.llama_sampler_init_min_p(s.min_p, _KEEP)] if s.min_p > 0 else [],
    "xtc": _xtc,
    "temperature": _temperature,
}
