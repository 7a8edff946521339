"""The chat without a terminal: lines in, replies out; or JSON lines both ways, for other programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
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
        session.notify = lambda text: self.say(f"note: {text}")
        self._leaving = False

    def run(self, lines: Iterable[str]) -> int:
        """Raises HandmillError: a script whose line was not answered must know."""
        for line in lines:
            if line.strip():
                call = commands.parse(line.rstrip("\r\n"))
                if isinstance(call, commands.Call):
                    call(self)
                else:
                    self.show(self.session.reply(call))
            if self._leaving:
                break
        return 0

    def say(self, text: str) -> None:
        print(TerminalFilter().feed(text), file=sys.stderr)

    def leave(self) -> None:
        self._leaving = True

    def show(self, chunks: Iterator[GenerationChunk]) -> None:
        terminal = TerminalFilter() if sys.stdout.isatty() else None
        for chunk in chunks:
            sys.stdout.write(terminal.feed(chunk.text) if terminal else chunk.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()


class JsonChat:
    """JSON lines both ways; the fields are documented in `runner.cli.chat`. An error is an answer, not an end."""

    def __init__(self, session: ChatSession, report: Callable[[str, str, GenerationChunk], dict[str, object]]) -> None:
        self.session = session
        session.notify = self.say
        self._report = report
        self._leaving = False

    def run(self, lines: Iterable[str]) -> int:
        for line in lines:
            if line.strip():
                try:
                    self._take(_request(line))
                except HandmillError as error:
                    self._write({"error": type(error).__name__, "message": str(error), "hint": error.hint})
            if self._leaving:
                break
        return 0

    def say(self, text: str) -> None:
        self._write({"notice": text})

    def leave(self) -> None:
        self._leaving = True

    def show(self, chunks: Iterator[GenerationChunk]) -> None:
        pieces: list[str] = []
        thoughts: list[str] = []
        last = GenerationChunk("", None)
        for last in chunks:
            for key, text, kept in (("thought", last.thought, thoughts), ("delta", last.text, pieces)):
                if text:
                    kept.append(text)
                    self._write({key: text})
        self._write(self._report("".join(pieces), "".join(thoughts), last))

    def _take(self, request: dict[str, str]) -> None:
        if "content" in request:
            self.show(self.session.reply(request["content"]))
            return
        call = commands.parse(request["command"])
        if not isinstance(call, commands.Call):
            raise UsageError(
                f"{printable(request['command'], 80)!r} is no command", hint='Write {"command": "/undo"}.'
            )
        call(self)
        self._write({"done": call.command.name})

    def _write(self, answer: dict[str, object]) -> None:
        print(json_line(answer), flush=True)


def _request(line: str) -> dict[str, str]:
    """One request, checked: a message or a command. Raises UsageError."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the line is no JSON: {printable(error)}") from error
    hint = 'Write {"content": "Hello"} or {"command": "/undo"}.'
    if not isinstance(request, dict):
        raise UsageError("the line is no JSON object", hint=hint)
    unknown = request.keys() - {"content", "command"}
    if unknown or len(request) != 1:
        what = f"unknown key {printable(min(unknown), 40)!r}" if unknown else "there is not one key in the object"
        raise UsageError(what, hint=hint)
    if not all(isinstance(value, str) for value in request.values()):
        raise UsageError(f"the value of {min(request)!r} is no string", hint=hint)
    return request
