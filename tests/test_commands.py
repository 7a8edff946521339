from __future__ import annotations

from collections.abc import Iterator

import pytest

from models.errors import UsageError
from runner.chat import commands
from runner.engine.protocol import GenerationChunk, Sampling
from runner.session import ChatSession
from tests.fake_engine import FakeEngine


class Recorder:
    """A chat that writes down what a command does to it."""

    def __init__(self) -> None:
        self.session = ChatSession(FakeEngine("Fine."), "Be brief.", Sampling())
        self.said: list[str] = []
        self.left = False

    def say(self, text: str) -> None:
        self.said.append(text)

    def show(self, chunks: Iterator[GenerationChunk]) -> None:
        self.said.append("".join(chunk.text for chunk in chunks))

    def leave(self) -> None:
        self.left = True


def call(line: str) -> Recorder:
    chat = Recorder()
    list(chat.session.reply("How are you?"))
    parsed = commands.parse(line)
    assert isinstance(parsed, commands.Call)
    parsed(chat)
    return chat


@pytest.mark.parametrize(
    ("line", "name", "argument"),
    [
        ("/help", "help", ""),
        ("  /HELP  ", "help", ""),
        ("/?", "help", ""),
        ("/quit", "exit", ""),
        ("/system You are\na miller.", "system", "You are\na miller."),
    ],
)
def test_parses_commands_and_aliases(line: str, name: str, argument: str) -> None:
    parsed = commands.parse(line)
    assert isinstance(parsed, commands.Call)
    assert (parsed.command.name, parsed.argument) == (name, argument)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hello", "hello"),
        ("quit", "quit"),
        ("/etc/hosts is what?", "/etc/hosts is what?"),
        ("//help me", "/help me"),
        ("1/2", "1/2"),
        ("/", "/"),
        ("/ help", "/ help"),
    ],
)
def test_leaves_messages_alone(line: str, message: str) -> None:
    assert commands.parse(line) == message


@pytest.mark.parametrize("line", ["/nonsense", "/clear everything", "/system2 x"])
def test_refuses_what_is_no_command(line: str) -> None:
    with pytest.raises(UsageError):
        commands.parse(line)


def test_help_and_completion_come_from_the_same_registry() -> None:
    (text,) = call("/help").said
    for command in commands.COMMANDS:
        assert command.usage in text
        assert command.summary in text
        assert command in commands.completions(f"/{command.name[:1]}")
    assert list(commands.completions("/q")) == [c for c in commands.COMMANDS if c.name == "exit"]
    assert list(commands.completions("help")) == []


def test_no_two_commands_share_a_name() -> None:
    double = commands.Command("clear", "again", lambda chat, argument: None)
    with pytest.raises(ValueError, match="/clear"):
        commands._by_name((*commands.COMMANDS, double))


def test_clear_keeps_the_system_prompt() -> None:
    assert [m.role for m in call("/clear").session.messages] == ["system"]


def test_system_shows_sets_and_removes() -> None:
    assert call("/system").said == ["Be brief."]
    assert call("/system Be long.").session.system == "Be long."
    assert call("/system off").session.system is None
    assert call("/system Be long.").session.messages[-1].role == "assistant"


def test_exit_leaves() -> None:
    assert call("/exit").left
    assert not call("/clear").left
