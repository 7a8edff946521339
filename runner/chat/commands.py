"""The chat's slash commands: one registry for dispatch, completion and /help.

A line that begins with a slash and a word is a command; `//` at its beginning stands for a slash of a message. A
path such as `/etc/hosts` is no command, since no command has a second slash.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from models.errors import UsageError
from models.text import printable
from runner import conversations
from runner.engine.protocol import Message

if TYPE_CHECKING:
    from runner.engine.protocol import GenerationChunk
    from runner.session import ChatSession

_COMMAND = re.compile(r"/([A-Za-z?]\w*)(?:\s+(.*))?", re.DOTALL)


class Chat(Protocol):
    """What a command may do to the chat that it was typed into."""

    @property
    def session(self) -> ChatSession: ...

    def say(self, text: str) -> None:
        """Tell the person something that is not of the conversation."""
        ...

    def show(self, chunks: Iterator[GenerationChunk]) -> None:
        """Give out a reply of the session as it comes."""
        ...

    def leave(self) -> None:
        """End the chat after this command."""
        ...


@dataclass(frozen=True)
class Command:
    """`argument` is how /help shows it; empty for a command that takes none."""

    name: str
    summary: str
    run: Callable[[Chat, str], None]
    argument: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def usage(self) -> str:
        return f"/{self.name} {self.argument}".rstrip()


@dataclass(frozen=True)
class Call:
    """A command as it was typed."""

    command: Command
    argument: str

    def __call__(self, chat: Chat) -> None:
        self.command.run(chat, self.argument)


def parse(line: str) -> Call | str:
    """The command that `line` calls, or the message that it is. Raises UsageError for a command there is not."""
    match = _COMMAND.fullmatch(line.strip())
    if match is None:
        return line[1:] if line.startswith("//") else line
    command = _BY_NAME.get(match[1].lower())
    if command is None:
        raise UsageError(f"there is no command /{printable(match[1], 40)}", hint="/help lists what there is.")
    argument = (match[2] or "").strip()
    if argument and not command.argument:
        raise UsageError(
            f"/{command.name} takes nothing after it", hint="A // at the beginning sends it as a message."
        )
    return Call(command, argument)


def completions(text: str) -> Iterator[Command]:
    """The commands that the beginning of a line, `text`, may become."""
    if text.startswith("/"):
        for command in COMMANDS:
            if any(name.startswith(text[1:].lower()) for name in (command.name, *command.aliases)):
                yield command


def _help(chat: Chat, _: str) -> None:
    width = max(len(command.usage) for command in COMMANDS)
    lines = [f"{command.usage:<{width}}  {command.summary}" for command in COMMANDS]
    keys = (
        ("Enter", "send"),
        ("Alt-Enter", "a new line (also Esc Enter, Ctrl-J)"),
        ("Ctrl-C", "stop the reply and keep what came"),
        ("Ctrl-D", "leave"),
    )
    chat.say("\n".join([*lines, "", *(f"{key:<{width}}  {what}" for key, what in keys)]))


def _clear(chat: Chat, _: str) -> None:
    chat.session.clear()
    chat.say("The conversation begins anew.")


def _system(chat: Chat, argument: str) -> None:
    if argument:
        chat.session.set_system(None if argument == "off" else argument)
        chat.say("No system prompt." if argument == "off" else "The system prompt is set.")
        return
    chat.say(chat.session.system or "No system prompt.")


def _undo(chat: Chat, _: str) -> None:
    chat.say(f"Taken back: {chat.session.undo()}")


def _retry(chat: Chat, _: str) -> None:
    chat.show(chat.session.retry())


def _think(chat: Chat, argument: str) -> None:
    session = chat.session
    if argument:
        if argument not in ("on", "off"):
            raise UsageError("/think takes on or off, or nothing")
        think = argument == "on"
        session.engine.encode_chat([Message("user", "")], think=think)  # raises TemplateError where there is no switch
        session.sampling = replace(session.sampling, think=think)
    said = {None: "as the model has it", True: "on", False: "off"}
    chat.say(f"Thinking: {said[session.sampling.think]}.")


def _save(chat: Chat, argument: str) -> None:
    if not argument:
        raise UsageError("/save takes a name", hint="The last conversation is saved anyway: chat --resume.")
    conversations.save(chat.session.messages, argument)
    chat.say("The conversation is saved.")


def _load(chat: Chat, argument: str) -> None:
    if not argument:
        chat.say("\n".join(conversations.names()) or "No conversation is saved.")
        return
    chat.session.resume(conversations.load(argument))
    turns = sum(message.role == "user" for message in chat.session.messages)
    chat.say(f"The conversation goes on after {turns} {'turn' if turns == 1 else 'turns'}.")


def _exit(chat: Chat, _: str) -> None:
    chat.leave()


COMMANDS = (
    Command("help", "show this", _help, aliases=("h", "?")),
    Command("clear", "forget the conversation, keep the system prompt", _clear, aliases=("new",)),
    Command("system", "set the system prompt; alone, show it", _system, argument="[TEXT|off]"),
    Command("undo", "take back the last message and its reply", _undo),
    Command("retry", "have the last message answered once more", _retry, aliases=("regen",)),
    Command("think", "have it think before it answers, or not; alone, show it", _think, argument="[on|off]"),
    Command("save", "keep the conversation under a name", _save, argument="NAME"),
    Command("load", "go on with one that was kept; alone, list them", _load, argument="[NAME]"),
    Command("exit", "leave", _exit, aliases=("quit", "q", "bye")),
)


def _by_name(commands: tuple[Command, ...]) -> dict[str, Command]:
    table: dict[str, Command] = {}
    for command in commands:
        for name in (command.name, *command.aliases):
            if name in table:
                raise ValueError(f"two commands are called /{name}")
            table[name] = command
    return table


_BY_NAME = _by_name(COMMANDS)
