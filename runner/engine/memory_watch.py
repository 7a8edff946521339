"""Memory that runs out while a model is loaded: another program took it, or it went to where it is slow."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from models.text import human_bytes
from runner import devices
from runner.engine.memory import available_memory
from runner.placement import CPU

NEAR_ZERO = 128 << 20
"""Bytes free on a device, or on the machine, under which one is warned."""
_SECONDS = 5.0

Free = Callable[[str], int | None]


def free_memory(device: str) -> int | None:
    """Bytes that are free on a device; of "CPU", what this process may still take. None where nobody says."""
    return available_memory() if device == CPU else devices.free_memory(device)


class MemoryWatch:
    """Looks now and then at what is free, and warns once of each device: not of what loading itself used up."""

    def __init__(
        self, used: Sequence[str], free: Free = free_memory, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._free, self._clock = free, clock
        self._warn_below = {
            device: min(NEAR_ZERO, at_first // 2)
            for device in dict.fromkeys([*used, CPU])
            if (at_first := free(device)) is not None
        }
        self._next = clock() + _SECONDS

    def look(self) -> str:
        """A warning, if one is due, else ""."""
        if self._clock() < self._next:
            return ""
        self._next = self._clock() + _SECONDS
        for device, limit in self._warn_below.items():
            free = self._free(device)
            if free is not None and free < limit:
                del self._warn_below[device]
                return _warning(device, free)
        return ""


def _warning(device: str, free: int) -> str:
    if device == CPU:
        return (
            f"only {human_bytes(free)} of memory are free: weights may be read from the disk again and again;"
            " close other programs, or load with a smaller --context"
        )
    return (
        f"only {human_bytes(free)} are free on {device}: another program may have taken them, and what does not fit"
        " is slow or fails; load with a larger --reserve, or a smaller --context"
    )
