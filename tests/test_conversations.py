"""Conversations on disk: saved after every turn, whatever ends it, and taken up again."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import OutputError, UsageError
from runner import conversations
from runner.chat import commands
from runner.chat.lines import LineChat
from runner.engine.protocol import Message
from runner.session import ChatSession
from tests.fake_engine import FakeEngine

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
TURN = [Message("system", "Be brief."), Message("user", "Hi\n中"), Message("assistant", "Yes.", (7, 8, 9))]


def test_what_was_said_comes_back(own_home: Path) -> None:
    conversations.save(TURN)
    conversations.save(TURN[:2], "a-mill.v2")
    assert conversations.load() == TURN
    assert conversations.load("a-mill.v2") == TURN[:2]
    assert sorted(conversations.names()) == ["a-mill.v2", "last"]
    path = own_home / "conversations" / "last.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["a-mill.v2.json", "last.json"]


@pytest.mark.parametrize("name", ["", "../state", "a/b", ".hidden", "x" * 65, "a\x1b[2J"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a conversation"):
        conversations.save(TURN, name)


def test_one_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(UsageError, match="no conversation 'last'") as caught:
        conversations.load()
    assert "none yet" in caught.value.hint


@given(st.binary(max_size=60))
def test_a_file_that_was_changed_is_a_named_error(data: bytes) -> None:
    refused(data)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"messages": 3}',
        '{"messages": [3]}',
        '{"messages": [{"role": "user", "content": "x"}]}',
        '{"messages": [{"role": "tool", "content": "x", "tokens": []}]}',
        '{"messages": [{"role": "user", "content": 3, "tokens": []}]}',
        '{"messages": [{"role": "user", "content": "x", "tokens": [true]}]}',
        '{"messages": ' + "[" * 100_000,
    ],
)
def test_what_is_no_conversation_is_a_named_error(text: str) -> None:
    refused(text.encode())


def refused(data: bytes) -> None:
    conversations.save(TURN)
    path = conversations._path("last")
    path.write_bytes(data)
    with pytest.raises(UsageError, match="no conversation that can be read"):
        conversations.load()


def test_a_disk_that_takes_nothing(own_home: Path) -> None:
    own_home.parent.mkdir(exist_ok=True)
    own_home.write_text("a file in the way")
    with pytest.raises(OutputError, match="cannot write"):
        conversations.save(TURN)


def test_every_turn_is_kept_also_one_that_was_broken_off() -> None:
    engine = FakeEngine("One.", "Two.")
    kept: list[list[Message]] = []
    session = ChatSession(engine, keep=lambda messages: kept.append(list(messages)))
    list(session.reply("1"))
    broken: Any = session.reply("2")
    next(broken)
    broken.close()
    assert [[message.content for message in messages] for messages in kept] == [["1", "One."], ["1", "One.", "2", "T"]]


def test_commands_save_and_load(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine("Guten Tag.", "Ja.")
    session = ChatSession(engine, "Be brief.")
    assert LineChat(session).run(["Hi\n", "/save mill\n", "/clear\n", "/load mill\n", "/load\n", "And?\n"]) == 0
    assert [message.content for message in session.messages] == ["Be brief.", "Hi", "Guten Tag.", "And?", "Ja."]
    assert capsys.readouterr().err.splitlines()[-2:] == ["The conversation goes on after 1 turn.", "mill"]
    call = commands.parse("/save")
    assert isinstance(call, commands.Call)
    with pytest.raises(UsageError, match="takes a name"):
        call(LineChat(session))


def chat(model: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "runner.cli.main", "chat", str(model), "--json"]
    command += ["--temperature", "0", "-q", *options]
    # What the tests themselves were told to ignore, as nohup does, the program would ignore, too.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    try:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_a_reply_saves_the_conversation(
    starter_model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    long = tmp_path / "long.gbnf"
    long.write_text('root ::= ("tick "){400}', encoding="utf-8")
    with chat(starter_model, "--grammar", str(long)) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write('{"content": "Say it."}\n')
        process.stdin.flush()
        said = "".join(json.loads(process.stdout.readline())["delta"] for _ in range(5))
        process.send_signal(number)
        process.communicate()
    assert process.returncode == 128 + number
    user, reply = conversations.load()
    assert user == Message("user", "Say it.")
    assert reply.content.startswith(said)
    assert reply.tokens
    # and the next chat goes on with it
    with chat(starter_model, "--resume", "--max-tokens", "3") as process:
        out, _ = process.communicate('{"content": "Thank you."}\n{"command": "/undo"}\n{"command": "/undo"}\n')
    notices = [line["notice"] for line in map(json.loads, out.splitlines()) if "notice" in line]
    assert notices == ["Taken back: Thank you.", "Taken back: Say it."]
