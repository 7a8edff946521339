"""What a converted file must do before it is called done: tokenize as its tokenizer does, and compute."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

from convert.check_texts import CHECK_TEXTS, LIMIT_TEXTS
from models.errors import CheckFailed, HandmillError
from models.isolated import DEADLINE_SECONDS, HINT, Ended, Isolated
from models.native import forward_pass, open_vocabulary

__all__ = [
    "CHECK_TEXTS",
    "LIMIT_TEXTS",
    "check_apart",
    "check_computation",
    "check_forward_pass",
    "check_vocabulary",
]

_FORWARD_TOKENS = 2
_BYTES_A_SECOND = 10_000_000
"""What the slowest disk reads."""

Result = TypeVar("Result")


def check_apart(isolated: Isolated, check: Callable[..., Result], path: Path, *args: object) -> Result:
    """`check(path, *args)`, one of the checks below, in a process that llama.cpp may end. Raises CheckFailed."""
    seconds = DEADLINE_SECONDS + path.stat().st_size / _BYTES_A_SECOND
    try:
        return isolated.call(check, path, *args, seconds=seconds)
    except Ended as ended:
        raise CheckFailed(
            f"llama.cpp does not run the file: {ended}",
            hint=HINT,
        ) from None


def check_vocabulary(path: Path, expected_ids: Mapping[str, list[int]], limits: Collection[str]) -> list[str]:
    """Hold the vocabulary of a file against the ids of its Hugging Face tokenizer. The weights may not be there yet.

    On the texts in `limits` llama.cpp is known to part from that tokenizer: warnings are returned for these.
    Raises CheckFailed.
    """
    warnings = []
    with _translated(), open_vocabulary(path) as vocabulary:
        for text, expected in expected_ids.items():
            ids = vocabulary.tokenize(text, add_special=False, parse_special=False)
            if ids == expected:
                continue
            if text in limits:
                warnings.append(f"llama.cpp tokenizes {text!r} otherwise than the model learnt it (a known limit)")
                continue
            raise CheckFailed(
                f"llama.cpp tokenizes {text!r} to other ids than the checkpoint's tokenizer: "
                f"{_first_difference(ids, expected)}",
                hint="The model would read your text wrongly. --no-check writes the file all the same.",
                text=text,
            )
    return warnings


def check_computation(
    path: Path, expected_ids: Mapping[str, list[int]], architecture: str, n_vocab: int, threads: int
) -> None:
    """Run one forward pass over the file. Raises CheckFailed if llama.cpp cannot, or the logits are not finite."""
    tokens = next((ids for ids in expected_ids.values() if ids), [0])
    # The vocabulary was checked on its own; a large one takes longer to load than the pass.
    no_vocabulary: dict[str, int | str] = {"tokenizer.ggml.model": "none", f"{architecture}.vocab_size": n_vocab}
    check_forward_pass(path, threads, tokens[:_FORWARD_TOKENS], no_vocabulary)


def check_forward_pass(
    path: Path, threads: int, tokens: Sequence[int] = (0, 1), overrides: Mapping[str, int | str] | None = None
) -> None:
    """Run one forward pass over a file. Raises CheckFailed if llama.cpp cannot, or the logits are not finite."""
    with _translated():
        logits = forward_pass(path, tokens, threads=threads, overrides=overrides)
    if not np.isfinite(logits).all():
        raise CheckFailed(
            "a forward pass gives NaN or infinite logits",
            hint="The weights do not hold in this type. Try --type BF16 or F32 to see whether they are sound.",
        )


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except CheckFailed:
        raise
    except HandmillError as error:
        raise CheckFailed(f"llama.cpp does not run the file: {error}", hint=error.hint) from error


def _first_difference(ids: list[int], expected: list[int]) -> str:
    for i, (ours, theirs) in enumerate(zip(ids, expected, strict=False)):
        if ours != theirs:
            return f"at token {i}, {ours} instead of {theirs}"
    return f"{len(ids)} tokens instead of {len(expected)}"
