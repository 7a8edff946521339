"""A conversation, on an engine that says what the test wants."""

from __future__ import annotations

import re
from typing import Any

import pytest

from models.errors import ContextOverflow, GenerationError, TemplateError, UsageError
from runner.engine.protocol import Message, Sampling
from runner.session import ChatSession
from tests.fake_engine import FakeEngine


def said(session: ChatSession) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in session.messages]


def test_turns_add_up_and_replies_keep_their_ids() -> None:
    engine = FakeEngine("One.", "Two.")
    session = ChatSession(engine, system="Count.")
    assert "".join(chunk.text for chunk in session.reply("a")) == "One."
    assert "".join(chunk.text for chunk in session.reply("b")) == "Two."
    assert said(session) == [
        ("system", "Count."),
        ("user", "a"),
        ("assistant", "One."),
        ("user", "b"),
        ("assistant", "Two."),
    ]
    assert session.messages[2].tokens == tuple(map(ord, "One."))
    assert engine.chats[1] == session.messages[:4]


def test_stats_and_context_used() -> None:
    session = ChatSession(FakeEngine("Hello."))
    assert session.context_used == 0
    for chunk in session.reply("hi"):
        stats = chunk.stats
    assert session.last_stats == stats
    assert session.context_used == stats.prompt_tokens + 6
    session.clear()
    assert session.context_used == 0


def test_no_more_of_the_context_is_used_than_there_is() -> None:
    engine = FakeEngine("Hello.")
    room = len(engine.encode_chat([Message("user", "hi")])) + 3
    session = ChatSession(FakeEngine("Hello.", n_ctx=room))
    list(session.reply("hi"))
    assert session.last_stats.prompt_tokens + session.last_stats.generated_tokens > room
    assert session.context_used == room


def test_a_cancelled_reply_keeps_what_came() -> None:
    engine = FakeEngine("Hello there")
    session = ChatSession(engine)
    chunks = []
    for chunk in session.reply("hi"):
        chunks.append(chunk)
        if len(chunks) == 5:
            engine.cancel()
    assert chunks[-1].finish_reason == "cancelled"
    assert said(session) == [("user", "hi"), ("assistant", "Hello")]


def test_a_reply_that_nobody_reads_on_keeps_what_came() -> None:
    session = ChatSession(FakeEngine("Hello there"))
    reply = session.reply("hi")
    next(reply)
    next(reply)
    reply.close()  # type: ignore[attr-defined]
    assert said(session) == [("user", "hi"), ("assistant", "He")]


def test_ctrl_c_while_it_computes_keeps_what_came() -> None:
    def interrupt(index: int) -> None:
        if index == 3:
            raise KeyboardInterrupt

    session = ChatSession(FakeEngine("Hello", before_chunk=interrupt))
    with pytest.raises(KeyboardInterrupt):
        list(session.reply("hi"))
    assert said(session) == [("user", "hi"), ("assistant", "Hel")]


@pytest.mark.parametrize("failure", [GenerationError("no"), KeyboardInterrupt(), TemplateError("bad")])
def test_where_nothing_came_the_message_is_taken_back(failure: BaseException) -> None:
    def fail(index: int) -> None:
        raise failure

    session = ChatSession(FakeEngine("Hello", before_chunk=fail), system="S")
    with pytest.raises(type(failure)):
        list(session.reply("hi"))
    assert said(session) == [("system", "S")]


def test_cancelled_before_anything_came_takes_the_message_back() -> None:
    engine = FakeEngine("Hello", before_chunk=lambda index: engine.cancel())
    session = ChatSession(engine)
    assert [chunk.finish_reason for chunk in session.reply("hi")] == ["cancelled"]
    assert session.messages == []


def test_an_empty_reply_is_a_reply() -> None:
    session = ChatSession(FakeEngine(""))
    assert [chunk.finish_reason for chunk in session.reply("hi")] == ["stop"]
    assert said(session) == [("user", "hi"), ("assistant", "")]


def test_outgrowing_the_context_says_what_to_do() -> None:
    session = ChatSession(FakeEngine("Hello", n_ctx=40))
    list(session.reply("hi"))
    with pytest.raises(ContextOverflow, match="40") as caught:
        list(session.reply("x" * 40))
    assert "/clear" in caught.value.hint
    assert caught.value.facts["n_ctx"] == 40
    assert said(session) == [("user", "hi"), ("assistant", "Hello")]


def test_clear_keeps_the_system_message_and_set_system_the_turns() -> None:
    session = ChatSession(FakeEngine("Hello"), system="A")
    list(session.reply("hi"))
    session.set_system("B")
    assert said(session) == [("system", "B"), ("user", "hi"), ("assistant", "Hello")]
    session.clear()
    assert said(session) == [("system", "B")]
    assert session.system == "B"
    session.set_system(None)
    assert session.messages == []
    assert session.system is None


def test_the_model_recommends_the_sampling() -> None:
    engine = FakeEngine("Hello")
    assert ChatSession(engine).sampling == engine.default_sampling
    session = ChatSession(engine, sampling=Sampling(temperature=0.0))
    list(session.reply("hi"))
    assert engine.samplings == [Sampling(temperature=0.0)]
    assert engine.chats == [[Message("user", "hi")]]


def test_undo_takes_back_a_turn_and_retry_asks_again() -> None:
    engine = FakeEngine("One", "Two", "Three")
    session = ChatSession(engine, system="S")
    list(session.reply("a"))
    list(session.reply("b"))
    assert session.undo() == "b"
    assert said(session) == [("system", "S"), ("user", "a"), ("assistant", "One")]
    assert "".join(chunk.text for chunk in session.retry()) == "Three"
    assert said(session) == [("system", "S"), ("user", "a"), ("assistant", "Three")]
    session.undo()
    for use in (session.undo, session.retry):
        with pytest.raises(UsageError):
            use()


def full_session(**options: Any) -> tuple[ChatSession, FakeEngine, list[str]]:
    """A conversation of ten turns of about 30 tokens in a context of 250."""
    engine = FakeEngine("Well.", n_ctx=250)
    notes: list[str] = []
    session = ChatSession(engine, "Be brief.", Sampling(max_tokens=50), notify=notes.append, **options)
    for turn in range(10):
        list(session.reply(f"turn {turn}"))
    return session, engine, notes


def test_the_oldest_turns_are_left_out_and_a_line_says_which() -> None:
    session, engine, notes = full_session()
    given = engine.chats[-1]
    assert given[0] == Message("system", "Be brief.")  # never the system prompt
    assert given[1].role == "user"
    assert given[-1].content == "turn 9"
    assert all(len(prompt) + 50 <= 250 for prompt in engine.prompts)
    assert len(session.messages) == 21  # nothing is lost
    left_out = session.messages[1 : -len(given) + 1 - 1]
    for note in notes:
        turns = [left_out.pop(0) for _ in range(2 * notes_turns(note))]
        n = len(engine.encode_text("".join(f"{m.role}: {m.content}\n" for m in turns)))
        assert f"({n} tokens, from {turns[0].content!r} on)" in note
    assert notes
    assert not left_out


def notes_turns(note: str) -> int:
    match = re.search(r"the (\d+) oldest turns|the oldest turn ", note)
    assert match
    return int(match[1] or 1)


def test_an_overflow_can_be_an_error_with_both_numbers() -> None:
    with pytest.raises(ContextOverflow, match=r"\d+ tokens.*250") as caught:
        full_session(overflow="error")
    assert caught.value.facts["n_ctx"] == 250


def test_clear_brings_everything_back() -> None:
    session, engine, notes = full_session()
    session.clear()
    noted = len(notes)
    list(session.reply("again"))
    assert engine.chats[-1] == session.messages[:2]
    assert len(notes) == noted
