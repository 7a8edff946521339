"""The picture of a benchmark: speed against depth. Needs matplotlib, which nothing else does."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import UsageError
from models.text import printable

if TYPE_CHECKING:
    from runner.bench import Speed


def require_matplotlib() -> None:
    """Raises UsageError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib", hint="Install it beside handmill: pip install 'handmill[plot]'")


def plot_speeds(speeds: Sequence[Speed], title: str, path: Path) -> None:
    """Draw into `path`, an .svg or .png; a panel for each test. Raises UsageError where it cannot be written."""
    from matplotlib.figure import Figure

    tests = list(dict.fromkeys(speed.test for speed in speeds))
    figure = Figure(figsize=(7, 3 * len(tests)), layout="constrained")
    figure.suptitle(printable(title).replace("$", r"\$"))
    for panel, test in zip(figure.subplots(len(tests), squeeze=False)[:, 0], tests, strict=True):
        shown = [speed for speed in speeds if speed.test == test]
        rates = [speed.tokens_per_second for speed in shown]
        errors = [speed.tokens_per_second * speed.spread / 2 for speed in shown]
        panel.errorbar([speed.depth for speed in shown], rates, yerr=errors, marker="o", capsize=3)
        panel.set(xlabel="tokens of context before", ylabel=f"{test}, tokens per second")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", path=path) from error
