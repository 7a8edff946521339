"""Text of a model, made safe for the terminal that shows it.

What a model says may have come from a web page that somebody wrote to be repeated. So nothing that a terminal obeys
passes: no escape sequence (colour, cursor, title, OSC 8 links, OSC 52 clipboard, device control), no control
character but newline and tab, no override of the reading direction, no invisible tag characters. What scripts and
emoji need does pass: joiners, variation selectors, the plain direction marks U+200E and U+200F.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from enum import Enum, auto

_SUSPECT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e0fff]"
)
_STRING_OPENERS = frozenset("]PX^_")
_C1_STRINGS = frozenset("\x90\x98\x9d\x9e\x9f")
_STRING_ENDS = frozenset("\x07\x18\x1a\x9c")
_TAGS = range(0xE0020, 0xE0080)
_FLAG = "\U0001f3f4"
_DIM, _USUAL = "\x1b[2m", "\x1b[0m"


class _State(Enum):
    TEXT = auto()
    ESCAPE = auto()
    """After ESC, and through the intermediate characters of a short sequence."""
    CSI = auto()
    STRING = auto()
    """Inside OSC, DCS, SOS, PM or APC. It ends at its terminator, or at the end of the line: a sequence left open
    must not swallow the rest of a reply."""
    STRING_ESCAPE = auto()


class TerminalFilter:
    """Takes a reply piece by piece; a sequence split over pieces is recognised all the same."""

    def __init__(self) -> None:
        self._state = _State.TEXT
        self._in_flag = False

    def feed(self, text: str) -> str:
        """What of `text` may go to the terminal. Newlines come out as `\\n`, tabs as they are."""
        if self._state is _State.TEXT and _SUSPECT.search(text) is None:
            if text:
                self._in_flag = text[-1] == _FLAG
            return text
        return "".join(map(self._step, text))

    def _step(self, char: str) -> str:
        if self._state is _State.TEXT:
            return self._text(char)
        if self._state is _State.STRING:
            if char == "\x1b":
                self._state = _State.STRING_ESCAPE
            elif char == "\n" or char in _STRING_ENDS:
                self._state = _State.TEXT
            return "\n" if char == "\n" else ""
        if self._state is _State.STRING_ESCAPE and char == "\\":
            self._state = _State.TEXT
            return ""
        if self._state is _State.CSI:
            return self._inside(char, first_final="@", parameters=True)
        if char == "[":
            self._state = _State.CSI
            return ""
        if char in _STRING_OPENERS:
            self._state = _State.STRING
            return ""
        self._state = _State.ESCAPE
        return self._inside(char, first_final="0", parameters=False)

    def _inside(self, char: str, *, first_final: str, parameters: bool) -> str:
        """One character of a sequence: an intermediate, a parameter, the final one, or what breaks it off."""
        if " " <= char <= "/" or (parameters and "0" <= char <= "?"):
            return ""
        self._state = _State.TEXT
        return "" if first_final <= char <= "~" else self._text(char)

    def _text(self, char: str) -> str:
        code = ord(char)
        if code in _TAGS:  # only as a flag's region, such as that of Scotland
            return char if self._in_flag else ""
        self._in_flag = char == _FLAG
        if _SUSPECT.match(char) is None:
            return char
        if char == "\x1b":
            self._state = _State.ESCAPE
        elif char == "\x9b":
            self._state = _State.CSI
        elif char in _C1_STRINGS:
            self._state = _State.STRING
        elif char in "\u2028\u2029":
            return "\n"
        elif 0xD800 <= code <= 0xDFFF:
            return "\ufffd"
        return ""


class Dimmed:
    """What a model thinks, on a terminal in a fainter colour, with an empty line between it and the answer.

    `write` takes what is safe to show.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._filter = TerminalFilter()
        self._open = False

    def feed(self, thought: str, *, answer: str = "") -> None:
        """Show more of the thought; `answer` says, if it is not empty, that it has ended."""
        if text := self._filter.feed(thought):
            self._write(text if self._open else f"{_DIM}{text}")
            self._open = True
        if answer:
            self.close("\n\n")

    def close(self, after: str = "\n") -> None:
        """Go back to the usual colour, if a thought was shown."""
        if self._open:
            self._write(f"{_USUAL}{after}")
            self._open = False


def json_line(value: object) -> str:
    """JSON for stdout, readable in a pipe; to a terminal in ASCII, so that nothing in it is obeyed."""
    return json.dumps(value, ensure_ascii=sys.stdout.isatty()).replace("\x7f", "\\u007f")
