"""A grammar that says which tokens may come: llama.cpp's own, and what it would not survive kept from it."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import native
from models.errors import GenerationError, UsageError
from models.native import Vocabulary
from models.text import printable
from runner.engine.gbnf import check_grammar

Logits = NDArray[np.float32]


class Constraint:
    """A grammar and how far it has come. Owns its C object: call `close`.

    Raises UsageError for a grammar that llama.cpp cannot read, or would not come to an end with.
    """

    def __init__(self, grammar: str, vocabulary: Vocabulary) -> None:
        check_grammar(grammar)
        self._lib = native.library()
        self._n_vocab = vocabulary.n_tokens
        with native.capture_log() as log, _stderr_of_c() as said:
            self._grammar: Any = self._lib.llama_sampler_init_grammar(vocabulary.pointer, grammar.encode(), b"root")
        if not self._grammar:
            reason = _parse_error(said()) or "; ".join(log.problems())
            raise UsageError(f"llama.cpp cannot use the grammar: {printable(reason, 500)}", option="grammar")
        self._candidates = (self._lib.llama_token_data * self._n_vocab)()
        self._ids = np.arange(self._n_vocab, dtype=np.int32)

    def pick(self, chain: Any, context: Any, index: int, also: int | None = None) -> int:
        """The token that `chain` picks from output row `index`, of those that the grammar allows, and `also`.

        The grammar looks at one token first, since most fit, and at all of them only if that one does not.
        Neither the grammar nor the chain counts the token as said. Raises GenerationError where none is allowed.
        """
        pointer = self._lib.llama_get_logits_ith(context, index)
        if not pointer:
            raise GenerationError(f"llama.cpp has no logits for output row {index}")
        logits: Logits = np.ctypeslib.as_array(pointer, shape=(self._n_vocab,))
        token = self._apply(chain, self._ids, logits)
        if token == also or self._allows(token):
            return token
        ids, allowed = self._allowed(logits, also)
        if not len(ids):
            raise GenerationError(
                "the grammar allows no token of this model here",
                hint="Is there a text that the grammar accepts, and can its characters be written by this model?",
            )
        return self._apply(chain, ids, allowed)

    def accept(self, token: int) -> None:
        """Take as said what `pick` gave. Any other token that the grammar does not allow ends the process."""
        self._lib.llama_sampler_accept(self._grammar, token)

    def close(self) -> None:
        grammar, self._grammar = self._grammar, None
        if grammar:
            self._lib.llama_sampler_free(grammar)

    def _allows(self, token: int) -> bool:
        one = (self._lib.llama_token_data * 1)((token, 1.0, 0.0))
        array = self._lib.llama_token_data_array(one, 1, -1, False)
        self._lib.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return bool(one[0].logit > float("-inf"))

    def _allowed(self, logits: Logits, also: int | None) -> tuple[NDArray[np.int32], Logits]:
        """All tokens that the grammar allows now, and `also`; and their logits."""
        table = self._fill(self._ids, logits)
        array = self._lib.llama_token_data_array(self._candidates, self._n_vocab, -1, False)
        self._lib.llama_sampler_apply(self._grammar, ctypes.byref(array))
        if also is not None:
            table["logit"][also] = logits[also]
        kept = table[np.isfinite(table["logit"])]  # a copy: the samplers take logarithms of what -inf becomes
        return kept["id"], kept["logit"]

    def _apply(self, chain: Any, ids: NDArray[np.int32], logits: Logits) -> int:
        self._fill(ids, logits)
        array = self._lib.llama_token_data_array(self._candidates, len(ids), -1, False)
        self._lib.llama_sampler_apply(chain, ctypes.byref(array))
        if not 0 <= array.selected < array.size:
            raise GenerationError("llama.cpp's samplers picked no token")
        return int(array.data[array.selected].id)

    def _fill(self, ids: NDArray[np.int32], logits: Logits) -> Any:
        layout = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        table = np.frombuffer(self._candidates, dtype=layout, count=len(ids))
        table["id"], table["logit"], table["p"] = ids, logits, 0.0
        return table


@contextmanager
def _stderr_of_c() -> Iterator[Callable[[], str]]:
    """What C code prints to stderr meanwhile goes to the function that this gives, to be called afterwards.

    llama.cpp tells a grammar's mistake there and not in its log.
    """
    text: list[str] = []
    try:
        saved = os.dup(2)
    except OSError:  # no stderr at all
        yield lambda: ""
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: "".join(text)
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            text.append(file.read().decode("utf-8", "replace"))


def _parse_error(text: str) -> str:
    """The first line of `parse: error parsing grammar: REASON at THE REST OF THE GRAMMAR`."""
    _, found, reason = text.partition("error parsing grammar: ")
    return reason.strip().partition("\n")[0] if found else ""
