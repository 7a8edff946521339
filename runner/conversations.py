"""Conversations on disk: what was said, so that a later chat goes on with it.

A reply's token ids are kept beside its text, so what was computed of them can be taken up, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from models.errors import UsageError
from models.files import write_json
from models.library import home
from models.text import printable
from runner.engine.protocol import Message, Role

LAST = "last"
"""The name under which a chat leaves its conversation after every turn."""
_NAME = re.compile(r"\w[\w.-]{0,63}")
_MOST_BYTES = 1 << 28


def save(messages: Sequence[Message], name: str = LAST) -> None:
    """Raises UsageError for what is no name, OutputError."""
    rows = [{"role": m.role, "content": m.content, "tokens": list(m.tokens)} for m in messages]
    write_json(_path(name), {"messages": rows})


def load(name: str = LAST) -> list[Message]:
    """Raises UsageError where there is none of that name, or its file was changed into something else."""
    path = _path(name)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("too large")
        return [_message(row) for row in json.loads(path.read_text(encoding="utf-8"))["messages"]]
    except FileNotFoundError:
        there = ", ".join(names()) or "none yet"
        raise UsageError(f"there is no conversation {name!r}", hint=f"There are: {there}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{printable(path)} is no conversation that can be read: {printable(error)}") from error


def names() -> list[str]:
    """Those that were saved, the last one changed first."""
    found = sorted(home().glob("conversations/*.json"), key=lambda path: -path.stat().st_mtime)
    return [path.stem for path in found if _NAME.fullmatch(path.stem)]


def _path(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise UsageError(f"{printable(name, 80)!r} cannot name a conversation", hint="Use letters, digits, - and _.")
    return home() / "conversations" / f"{name}.json"


def _message(row: dict[str, object]) -> Message:
    role, content, tokens = row["role"], row["content"], row["tokens"]
    if role not in get_args(Role) or not isinstance(content, str) or not isinstance(tokens, list):
        raise ValueError("a message is none")
    if not all(type(token) is int for token in tokens):
        raise ValueError("a token is no number")
    return Message(cast(Role, role), content, tuple(tokens))
