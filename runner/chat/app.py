"""The chat in a terminal: prompt-toolkit reads, the reply streams, a toolbar tells how it goes.

Reading and replying fail apart: an error in a reply is shown and the chat goes on. While a reply streams, the
terminal does not echo, so what is typed meanwhile does not mix with it and stands in the next prompt.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.application.current import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output
from prompt_toolkit.styles import Style
from prompt_toolkit.utils import get_cwidth

from models.errors import HandmillError
from models.text import printable
from runner.chat import commands
from runner.chat.render import Dimmed, TerminalFilter
from runner.engine.protocol import Engine, GenerationChunk

if TYPE_CHECKING:
    from runner.session import ChatSession

_PROMPT = "› "
_STYLE = Style.from_dict({"prompt": "bold ansicyan", "bottom-toolbar": "noreverse fg:ansibrightblack"})


class ChatApp:
    """One conversation at a terminal. `input` and `output` are prompt-toolkit's, for tests."""

    def __init__(
        self,
        session: ChatSession,
        engine: Engine,
        *,
        history: Path | None = None,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        self.session = session
        session.notify = lambda text: self.say(f"[{text}]")
        self._engine = engine
        self._leaving = False
        self._at_line_start = True
        self._prompt: PromptSession[str] = PromptSession(
            message=[("class:prompt", _PROMPT)],
            multiline=True,
            prompt_continuation=" " * len(_PROMPT),
            key_bindings=_key_bindings(),
            completer=_CommandCompleter(),
            complete_while_typing=True,
            history=_open_history(history),
            bottom_toolbar=self._toolbar,
            style=_STYLE,
            input=input,
            output=output,
        )

    def run(self) -> int:
        """Talk until the person leaves; the exit code."""
        info = self._engine.info
        self.say(f"{info.name} on {info.device}\n{info.n_ctx} tokens of context, /help shows what there is\n")
        while not self._leaving:
            try:
                line = self._prompt.prompt()
            except KeyboardInterrupt:
                if not self._prompt.default_buffer.text:
                    self.say("Ctrl-D or /exit leaves.")
                continue
            except EOFError:
                break
            try:
                self._take(line)
            except HandmillError as error:
                self.say(f"{error}\n  {error.hint}" if error.hint else str(error))
        return 0

    def say(self, text: str) -> None:
        terminal = TerminalFilter()
        self._write(("" if self._at_line_start else "\n") + terminal.feed(text) + "\n")

    def leave(self) -> None:
        self._leaving = True

    def _take(self, line: str) -> None:
        if not line.strip():
            return
        call = commands.parse(line)
        if isinstance(call, commands.Call):
            call(self)
        else:
            self.show(self.session.reply(call))

    def show(self, chunks: Iterator[GenerationChunk]) -> None:
        """Show a reply as it comes. Ctrl-C ends it and keeps what came, a second one leaves."""
        terminal, thoughts = TerminalFilter(), Dimmed(self._write)
        finish = None
        with _quiet_keyboard(), _ctrl_c_stops(self._engine) as stopped:
            try:
                for chunk in chunks:
                    thoughts.feed(chunk.thought, answer=chunk.text)
                    self._write(terminal.feed(chunk.text))
                    finish = chunk.finish_reason
                    if stopped.is_set():  # pressed before the engine listened
                        self._engine.cancel()
            finally:
                thoughts.close()
                self._write("" if self._at_line_start else "\n")
        if finish == "cancelled":
            self.say("[stopped]")
        elif finish == "length":
            self.say("[cut off: --max-tokens or the context is used up]")

    def _write(self, text: str) -> None:
        if text:
            self._at_line_start = text.endswith("\n")
            output = self._prompt.output
            output.write_raw(text)
            output.flush()

    def _toolbar(self) -> FormattedText:
        """As many of the facts as fit the width, the model's name cut first."""
        info, stats, used = self._engine.info, self.session.last_stats, self.session.context_used
        where = " + ".join(info.device_names) or "CPU"
        if 0 < info.gpu_layers < info.n_layers:
            where = f"{info.gpu_layers}/{info.n_layers} on {where}"
        facts = [where, f"context {used}/{info.n_ctx}"]
        if stats is not None and stats.generated_tokens:
            facts += [f"{stats.tokens_per_second:.1f} tok/s", f"{stats.cached_tokens} cached"]
        return FormattedText(
            [("class:bottom-toolbar", toolbar_text(info.name, facts, get_app().output.get_size().columns))]
        )


def toolbar_text(name: str, facts: Iterable[str], columns: int) -> str:
    """`name` and `facts` on one line of `columns` cells: the name is shortened first, then facts go from the end."""
    left = list(facts)
    while True:
        tail = "".join(f" · {printable(fact)}" for fact in left)
        room = columns - 2 - get_cwidth(tail)
        if room >= 8 or not left:
            break
        left.pop()
    shown = printable(name)
    if get_cwidth(shown) > room:
        while shown and get_cwidth(shown) > room - 1:
            shown = shown[:-1]
        shown += "…"
    return f" {shown}{tail}"


class _CommandCompleter(Completer):
    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        if " " not in text and "\n" not in text:
            for command in commands.completions(text):
                yield Completion(
                    f"/{command.name}", start_position=-len(text), display=command.usage, display_meta=command.summary
                )


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _send(event: KeyPressEvent) -> None:
        """Send what stands there. Pasted newlines are text and do not come here."""
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    @bindings.add("c-j")
    def _new_line(event: KeyPressEvent) -> None:
        """Begin a new line of the same message."""
        event.current_buffer.insert_text("\n")

    return bindings


def _open_history(path: Path | None) -> History:
    """The history in `path`, readable by its owner only; in memory where that cannot be."""
    if path is not None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600))
            return FileHistory(str(path))
    return InMemoryHistory()


@contextmanager
def _ctrl_c_stops(engine: Engine) -> Iterator[threading.Event]:
    """Make the first Ctrl-C cancel the reply, so that the session keeps what came; the second is one as ever."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        engine.cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _quiet_keyboard() -> Iterator[None]:
    """Do not echo what is typed; it stays in the terminal's queue for the next prompt. Ctrl-C works on."""
    try:
        import termios

        before = termios.tcgetattr(sys.stdin.fileno())
    except (ImportError, OSError, ValueError, termios.error):
        yield
        return
    quiet = termios.tcgetattr(sys.stdin.fileno())
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)
