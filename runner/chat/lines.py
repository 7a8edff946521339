"""The chat without a terminal: lines in, replies out; or JSON lines both ways, for other programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from models.errors import HandmillError, UsageError
from models.text import printable
from runner.chat import commands
from runner.chat.render import TerminalFilter, json_line
from runner.engine.protocol import GenerationChunk

if TYPE_CHECKING:
    from runner.session import ChatSession


class LineChat:
    """Answers each line on stdout and ends with the input. Commands work; what they say goes to stderr."""

    def __init__(self, session: ChatSession) -> None:
        self.session = session
        self._leaving = False

    def run(self, lines: Iterable[str]) -> int:
        """Raises HandmillError: a script whose line was not answered must know."""
        for line in lines:
            if line.strip():
                call = commands.parse(line.rstrip("\r\n"))
                if isinstance(call, commands.Call):
                    call(self)
                else:
                    self._answer(call)
            if self._leaving:
                break
        return 0

    def say(self, text: str) -> None:
        print(TerminalFilter().feed(text), file=sys.stderr)

    def leave(self) -> None:
        self._leaving = True

    def _answer(self, text: str) -> None:
        terminal = TerminalFilter() if sys.stdout.isatty() else None
        for chunk in self.session.reply(text):
            sys.stdout.write(terminal.feed(chunk.text) if terminal else chunk.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()


class JsonChat:
    """JSON lines both ways; the fields are documented in `runner.cli.chat`. An error is an answer, not an end."""

    def __init__(self, session: ChatSession, report: Callable[[str, GenerationChunk], dict[str, object]]) -> None:
        self._session = session
        self._report = report

    def run(self, lines: Iterable[str]) -> int:
        for line in lines:
            if line.strip():
                try:
                    self._take(_request(line))
                except HandmillError as error:
                    self._write(
                        {"type": "error", "error": type(error).__name__, "message": str(error), "hint": error.hint}
                    )
        return 0

    def _take(self, request: dict[str, object]) -> None:
        if request.get("clear"):
            self._session.clear()
        if "system" in request:
            system = request["system"]
            self._session.set_system(system if isinstance(system, str) else None)
        text = request.get("text")
        if not isinstance(text, str):
            self._write({"type": "done"})
            return
        pieces: list[str] = []
        last = GenerationChunk("", None)
        for last in self._session.reply(text):
            if last.text:
                pieces.append(last.text)
                self._write({"type": "chunk", "text": last.text})
        self._write({"type": "reply", **self._report("".join(pieces), last)})

    def _write(self, answer: dict[str, object]) -> None:
        print(json_line(answer), flush=True)


def _request(line: str) -> dict[str, object]:
    """One request, checked. Raises UsageError."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the line is no JSON: {printable(error)}") from error
    if not isinstance(request, dict):
        raise UsageError("the line is no JSON object", hint='Write {"text": "Hello"}.')
    for key, kinds in (("text", (str,)), ("system", (str, type(None))), ("clear", (bool,))):
        if key in request and not isinstance(request[key], kinds):
            raise UsageError(f"'{key}' has a value of the wrong kind")
    unknown = request.keys() - {"text", "system", "clear"}
    if unknown or not request:
        raise UsageError(
            f"unknown key {printable(min(unknown))!r}" if unknown else "the object is empty",
            hint="The keys are text, system and clear.",
        )
    return request
