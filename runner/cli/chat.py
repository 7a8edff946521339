"""Talk with a model in the terminal.

Where stdin is no terminal, each of its lines is a message and is answered on stdout. After every turn, also one that
was broken off, the conversation is saved for --resume; /save and /load keep others.

--json is for other programs: JSON lines in, JSON lines out. {"content": "..."} sends a message, {"command": "/undo"}
runs a command of the chat. Out come {"thought": "..."} while a model thinks and {"delta": "..."} while it answers,
then the object that `handmill run --json` prints; {"notice": "..."} for what a command says or the conversation has
to tell; {"done": "undo"} after a command; and {"error": NAME, "message": "...", "hint": "..."}, after which the chat
goes on. Every request ends with an object that has `finish_reason`, `done` or `error`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.errors import HandmillError, TemplateError
from runner.cli.loading import loaded_engine
from runner.cli.options import add_load_options, add_output_options, add_sampling_options, sampling

if TYPE_CHECKING:
    from runner.engine.protocol import Message
    from runner.session import ChatSession

HELP = "talk, in the terminal"
ORDER = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a GGUF file, a library name, owner/name[:TYPE] or a checkpoint directory (default: the last one used)",
    )
    parser.add_argument(
        "--overflow",
        choices=["drop", "shift", "error"],
        default="drop",
        help="a full context: leave out the oldest turns; let replies run on too; or stop (default: drop)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the last conversation")
    add_sampling_options(parser)
    add_load_options(parser)
    add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    with loaded_engine(args) as engine:
        if not engine.has_chat_template:
            raise TemplateError(
                f"{engine.info.name} is a base model: it has no chat template, so it cannot take turns",
                hint="`handmill run MODEL PROMPT` lets it continue a text.",
            )
        from runner import conversations
        from runner.session import ChatSession

        settings = sampling(args, engine.default_sampling)
        session = ChatSession(
            engine, overflow=args.overflow, sampling=settings, keep=lambda said: _save(said, session)
        )
        if args.resume:
            session.resume(conversations.load())
        if args.system is not None:
            session.set_system(args.system)
        if args.json:
            from runner.chat.lines import JsonChat
            from runner.cli.run import report

            return JsonChat(session, lambda *reply: report(*reply, info=engine.info)).run(sys.stdin)
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            from runner.chat.lines import LineChat

            return LineChat(session).run(sys.stdin)
        from models.library import home
        from runner.chat.app import ChatApp

        return ChatApp(session, engine, history=home() / "history").run()


def _save(messages: Sequence[Message], session: ChatSession) -> None:
    """Leave a conversation to --resume. A full disk must not end it."""
    from runner import conversations

    try:
        conversations.save(messages)
    except HandmillError as error:
        session.notify(f"the conversation is not saved: {error}")
