"""The chat: prompt-toolkit on a pipe with a scripted engine, then the whole program on a real pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from prompt_toolkit.data_structures import Size
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output.vt100 import Vt100_Output

from models.errors import GenerationError, UsageError
from runner.chat.app import ChatApp, toolbar_text
from runner.chat.lines import JsonChat, LineChat
from runner.cli.run import report
from runner.engine.protocol import GenerationChunk, Message, Sampling
from runner.session import ChatSession
from tests.fake_engine import FakeEngine


def talk(engine: FakeEngine, *typed: str, history: Path | None = None) -> tuple[str, ChatSession]:
    """Type all of it, then Ctrl-D; what the terminal got, and the session."""
    screen = io.StringIO()
    session = ChatSession(engine, None, Sampling())
    with create_pipe_input() as keys:
        output = Vt100_Output(screen, lambda: Size(rows=24, columns=80), term="xterm", enable_cpr=False)
        app = ChatApp(session, engine, history=history, input=keys, output=output)
        keys.send_text("".join(typed) + "\x04")
        assert app.run() == 0
    return screen.getvalue(), session


def said(session: ChatSession, role: str) -> list[str]:
    return [message.content for message in session.messages if message.role == role]


def test_enter_sends_and_the_reply_is_shown() -> None:
    screen, session = talk(FakeEngine("我很好 🌾"), "你好\r")
    assert "我很好 🌾" in screen
    assert said(session, "user") == ["你好"]


def test_alt_enter_and_ctrl_j_begin_a_line() -> None:
    _, session = talk(FakeEngine(), "one\x1b\rtwo\nthree\r")
    assert said(session, "user") == ["one\ntwo\nthree"]


def test_a_paste_of_many_lines_is_one_message() -> None:
    pasted = "\n".join(f"line {number} 中文 🌾" for number in range(50))
    _, session = talk(FakeEngine(), f"\x1b[200~{pasted}\x1b[201~", "\r")
    assert said(session, "user") == [pasted]


def test_empty_lines_are_not_sent() -> None:
    _, session = talk(FakeEngine(), "\r", "   \r")
    assert session.messages == []


def test_what_a_model_says_does_not_command_the_terminal() -> None:
    screen, _ = talk(FakeEngine(["safe", "\x1b]0;ow", "ned\x07", "\x1b[2", "J!\u202e"]), "hi\r")
    assert "safe!" in screen
    assert "owned" not in screen
    assert "\x1b[2J" not in screen
    assert "\u202e" not in screen


def test_ctrl_c_stops_the_reply_and_keeps_what_came() -> None:
    def press(index: int) -> None:
        if index == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    screen, session = talk(FakeEngine("abcdefgh", "again", before_chunk=press), "hi\r", "more\r")
    assert "[stopped]" in screen
    assert said(session, "assistant")[0] in ("abc", "abcd")
    assert said(session, "user") == ["hi", "more"]
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_at_the_prompt_drops_the_line_or_says_how_to_leave() -> None:
    screen, session = talk(FakeEngine(), "half a thought\x03", "whole\r")
    assert said(session, "user") == ["whole"]
    assert "Ctrl-D or /exit leaves" not in screen
    screen, _ = talk(FakeEngine(), "\x03")
    assert "Ctrl-D or /exit leaves" in screen


def test_what_happens_meanwhile_is_told_on_a_line_of_its_own() -> None:
    class Losing(FakeEngine):
        def generate(self, tokens: Sequence[int], sampling: Sampling | None = None) -> Iterator[GenerationChunk]:
            for index, chunk in enumerate(super().generate(tokens, sampling)):
                if index == 3:
                    yield GenerationChunk("", None, chunk.stats, notice="the GPU \x1b[2Jis lost")
                yield chunk

    screen, session = talk(Losing("abcdef"), "hi\r")
    assert "abc\n[the GPU is lost]\ndef\n" in screen.replace("\r", "")
    assert said(session, "assistant") == ["abcdef"]
    assert session.messages[-1].tokens == tuple(map(ord, "abcdef"))


def test_an_error_in_a_reply_is_shown_and_the_chat_goes_on() -> None:
    engine = FakeEngine(GenerationError("the mill is jammed", hint="Oil it."), "Fine again.")
    screen, session = talk(engine, "one\r", "two\r", "/nonsense\r")
    assert "the mill is jammed" in screen
    assert "Oil it." in screen
    assert "Fine again." in screen
    assert "there is no command /nonsense" in screen
    assert said(session, "user") == ["two"]


def test_commands_work_and_exit_ends_the_chat() -> None:
    screen, session = talk(FakeEngine(), "/system Be kind.\r", "/exit\r", "never sent\r")
    assert session.messages == [Message("system", "Be kind.")]
    assert "never sent" not in screen


def test_a_reply_cut_off_says_so() -> None:
    engine = FakeEngine("abcdefgh")
    session = ChatSession(engine, None, Sampling(max_tokens=3))
    screen = io.StringIO()
    with create_pipe_input() as keys:
        keys.send_text("hi\r\x04")
        output = Vt100_Output(screen, lambda: Size(rows=24, columns=80), enable_cpr=False)
        ChatApp(session, engine, input=keys, output=output).run()
    assert "[cut off" in screen.getvalue()


def test_history_is_kept_on_disk_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history"
    talk(FakeEngine(), "remember me\r", history=path)
    assert "+remember me" in path.read_text()
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    _, session = talk(FakeEngine(), "\x1b[A\r", history=path)
    assert said(session, "user") == ["remember me"]


def test_a_history_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, session = talk(FakeEngine(), "hi\r", history=tmp_path / "file" / "history")
    assert said(session, "user") == ["hi"]


@pytest.mark.parametrize("columns", [200, 80, 60, 40, 20, 8])
def test_the_toolbar_keeps_to_one_line(columns: int) -> None:
    from prompt_toolkit.utils import get_cwidth

    text = toolbar_text("模型 Qwen2-0.5B-Instruct\x1b[31m", ["CPU", "context 10/4096", "9.5 tok/s"], columns)
    assert get_cwidth(text) <= max(columns, 3)
    assert text.isprintable()
    if columns >= 80:
        assert text.endswith("CPU · context 10/4096 · 9.5 tok/s")


def test_lines_are_answered_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    chat = LineChat(ChatSession(FakeEngine("One.", "Two."), None, Sampling()))
    assert chat.run(["Hello\n", "\n", "/system Be kind.\n", "Again\r\n", "/exit\n", "not this\n"]) == 0
    out, err = capsys.readouterr()
    assert out == "One.\nTwo.\n"
    assert "system prompt is set" in err
    assert said(chat.session, "user") == ["Hello", "Again"]


def json_chat(engine: FakeEngine, *lines: str) -> tuple[list[dict[str, object]], ChatSession]:
    session = ChatSession(engine, None, Sampling())
    stdout, sys.stdout = sys.stdout, io.StringIO()
    try:
        assert JsonChat(session, lambda *reply: report(*reply, info=engine.info)).run(lines) == 0
        written = sys.stdout.getvalue()
    finally:
        sys.stdout = stdout
    return [json.loads(line) for line in written.splitlines()], session


def test_json_lines_both_ways() -> None:
    answers, session = json_chat(FakeEngine("Hi 🌾"), '{"command": "/system Be kind."}', '{"content": "你好\\n"}\n')
    assert answers[:2] == [{"notice": "The system prompt is set."}, {"done": "system"}]
    assert "".join(str(a["delta"]) for a in answers if "delta" in a) == "Hi 🌾"
    last = answers[-1]
    assert (last["text"], last["finish_reason"], last["generated_tokens"]) == ("Hi 🌾", "stop", 4)
    assert session.messages == [
        Message("system", "Be kind."),
        Message("user", "你好\n"),
        Message("assistant", "Hi 🌾", session.messages[2].tokens),
    ]


def test_json_commands() -> None:
    lines = ['{"content": "a"}', '{"command": "/retry"}', '{"command": "/undo"}', '{"command": "/exit"}', "never read"]
    answers, session = json_chat(FakeEngine("One", "Two"), *lines)
    assert [a["text"] for a in answers if "text" in a] == ["One", "Two"]
    assert answers[-3:] == [{"notice": "Taken back: a"}, {"done": "undo"}, {"done": "exit"}]
    assert session.messages == []


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        "{}",
        '{"content": 3}',
        '{"contents": "x"}',
        '{"content": "a", "command": "/undo"}',
        '{"command": "undo"}',
        '{"command": "/nothing"}',
        '{"command": "/undo"}',
        "[" * 100_000,
    ],
)
def test_json_a_bad_line_is_an_error_and_no_end(line: str) -> None:
    answers, _ = json_chat(FakeEngine("Fine."), line, '{"content": "hi"}')
    assert answers[0]["error"] == UsageError.__name__
    assert answers[0]["message"]
    assert answers[-1]["text"] == "Fine."


class Terminal:
    """A program on a pseudo-terminal of 80 by 24, and what it has shown and nobody has waited for yet."""

    def __init__(self, argv: list[str]) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        # The leader of a new session gets as its terminal the first one that it opens: then Ctrl-C is a signal.
        code = (
            "import os, sys; os.open(os.ttyname(0), os.O_RDWR); "
            "from runner.cli.main import console; sys.exit(console())"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"TERM": "xterm"},
            start_new_session=True,
        )
        os.close(slave)
        self._seen = b""

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, text: str, seconds: float = 60) -> None:
        import select

        deadline = time.monotonic() + seconds
        while text.encode() not in self._seen:
            if not select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"{text!r} did not come, but {self._seen!r}")
            try:
                piece = os.read(self._master, 65536)
            except OSError:
                raise AssertionError(f"the program ended; it showed {self._seen!r}") from None
            if b"\x1b[6n" in piece:  # it asks where the cursor is, as of any terminal
                self.press("\x1b[5;1R")
            self._seen += piece
        self._seen = self._seen.partition(text.encode())[2]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_the_whole_program_on_a_real_terminal(starter_model: Path, own_home: Path, tmp_path: Path) -> None:
    pytest.importorskip("pty")
    long = tmp_path / "long.gbnf"
    long.write_text('root ::= ("tick "){400}', encoding="utf-8")
    terminal = Terminal(["chat", str(starter_model), "--grammar", str(long), "-c", "512", "-j", "1"])
    try:
        terminal.wait_for("context 0/512")
        terminal.press("Write a long story about a mill.\r")
        terminal.wait_for("tick tick")
        terminal.press("\x03")
        terminal.wait_for("[stopped]")
        terminal.wait_for("tok/s")
        terminal.press("/system 中文\r")
        terminal.wait_for("The system prompt is set.")
        terminal.wait_for("tok/s")  # the prompt stands again
        terminal.press("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()
    assert "+Write a long story" in (own_home / "history").read_text()
