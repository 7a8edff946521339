"""Text from a file, a checkpoint or the network, made fit to stand in a message."""

from __future__ import annotations

_UNITS = ("B", "kB", "MB", "GB", "TB")


def printable(text: object, limit: int = 200) -> str:
    """`text` with every control, format and unassigned character escaped, cut to `limit` characters.

    A tensor or file name is whatever a stranger wrote: without this, an error message could move the cursor,
    set the title or turn the reading direction of the terminal that shows it.
    """
    source = str(text)
    cut = source if len(source) <= limit else source[: limit - 1] + "…"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in cut)


def human_bytes(count: float) -> str:
    """A size for a person, in powers of 1000: `human_bytes(98_362_432)` is "98.4 MB"."""
    for unit in _UNITS[:-1]:
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} {_UNITS[-1]}"


def human_count(count: int) -> str:
    """A number of weights for a person: `human_count(134_515_008)` is "135M"."""
    for divisor, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= divisor * 0.9995:
            return f"{count / divisor:.3g}{letter}"
    return str(count)
