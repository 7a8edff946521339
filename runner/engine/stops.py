"""Where a reply ends because of what it says: texts that are watched for, and never shown."""

from __future__ import annotations

from collections.abc import Sequence

from runner.engine.text_stream import overlap


class StopFilter:
    """Passes text on, up to the first of `stops`; what may be the beginning of one waits until it is known.

    Of several the one that ends first counts, and of those that end together the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._waiting = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The part of all text so far that can be shown now."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        self._waiting += text
        ends = [(at + len(stop), -len(stop)) for stop in self._stops if (at := self._waiting.find(stop)) >= 0]
        if ends:
            end, length = min(ends)
            shown, self._waiting, self.stopped = self._waiting[: end + length], "", True
            return shown
        keep = max(overlap(self._waiting, stop) for stop in self._stops)
        shown = self._waiting[: len(self._waiting) - keep]
        self._waiting = self._waiting[len(shown) :]
        return shown

    def flush(self) -> str:
        """What still waits, at the end of a reply."""
        waiting, self._waiting = self._waiting, ""
        return waiting
