"""Copies of what a context's memory holds: of all of it, and of the part that cannot be cut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

State = NDArray[np.uint8]


@dataclass(frozen=True)
class Checkpoint:
    """What cannot be cut of a memory, as it was after `n` tokens."""

    n: int
    data: State


@dataclass(frozen=True)
class Snapshot:
    """A whole memory: what it takes to go on after `tokens` without computing them."""

    tokens: tuple[int, ...]
    first: int
    """The oldest token that a window still holds; 0 where there is none."""
    data: State
    checkpoints: tuple[Checkpoint, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + sum(checkpoint.data.nbytes for checkpoint in self.checkpoints)
