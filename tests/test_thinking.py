"""Models that think: the template's switch, the thought apart from the answer, its budget, and a grammar after it."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.converter import convert_checkpoint
from convert.file_types import file_type
from models.errors import TemplateError
from models.native import open_vocabulary
from runner.chat.render import Dimmed
from runner.cli import main as cli
from runner.engine.local import LocalEngine, load
from runner.engine.protocol import GenerationChunk, LoadOptions, Message, Sampling
from runner.prompt import PromptEncoder
from runner.session import ChatSession
from runner.thinking import STYLES, ThoughtFilter, ThoughtMarks, find_marks
from tests.checkpoints import Json, edit_json, starter_checkpoint

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
MARKS = ("<think>", "</think>")
MESSAGES = [Message("user", "Name a river.")]
GREEDY = Sampling(temperature=0.0, max_tokens=24)


def write_thinker(folder: Path, starter: Path, template: str = TEMPLATE) -> Path:
    """The first blocks of SmolLM2 with two of its spare tokens made the marks of a thought."""
    source = starter_checkpoint(folder / "source", starter, blocks=2, shards=1)

    def rename(tokenizer: Json) -> None:
        spare = [token for token in tokenizer["added_tokens"] if token["content"] in ("<repo_name>", "<reponame>")]
        for token, text in zip(spare, MARKS, strict=True):
            vocab = tokenizer["model"]["vocab"]
            vocab[text] = vocab.pop(token["content"])
            token.update(content=text, special=False)

    edit_json(source / "tokenizer.json", rename)
    (source / "chat_template.jinja").write_text(template, encoding="utf-8")
    return convert_checkpoint(source, folder / "thinker.gguf", file_type("Q8_0")).path


@pytest.fixture(scope="module")
def thinker(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_thinker(tmp_path_factory.mktemp("thinker"), starter_model)


@pytest.fixture(scope="module")
def engine(thinker: Path) -> Iterator[LocalEngine]:
    with load(thinker, LoadOptions(context=512, gpu_layers=0, cache=0)) as loaded:
        yield loaded


def mark_ids(engine: LocalEngine) -> list[int]:
    return [engine._vocabulary.special_tokens[text] for text in MARKS]


def steering(engine: LocalEngine) -> dict[str, Any]:
    """What makes this model, which has not learnt it, open one thought and never close it."""
    opens, closes = mark_ids(engine)
    context = engine.context
    context.clear()
    context.extend(engine.encode_chat(MESSAGES))
    logits = context.logits()
    bias = round(float(logits.max() - logits[opens])) + 2
    penalties = {"presence_penalty": 10.0, "repeat_penalty": 10.0}  # so that it comes once
    return {"logit_bias": ((opens, bias), (closes, -100.0)), **penalties}


def thinks(engine: LocalEngine, **fields: Any) -> Sampling:
    return replace(GREEDY, **steering(engine), **fields)


def whole(chunks: list[GenerationChunk]) -> tuple[str, str]:
    return "".join(chunk.thought for chunk in chunks), "".join(chunk.text for chunk in chunks)


# The filter


def in_pieces(text: str, cuts: list[int], marks: ThoughtMarks, *, inside: bool) -> tuple[str, str]:
    thoughts, parts, position = ThoughtFilter(marks, inside=inside), [], 0
    for size in [*cuts, len(text)]:
        parts.append(thoughts.feed(text[position : position + size]))
        position += size
    parts.append(thoughts.flush())
    return "".join(thought for thought, _ in parts), "".join(answer for _, answer in parts)


def reference(text: str, marks: ThoughtMarks, *, inside: bool) -> tuple[str, str]:
    begun = text.lstrip()
    if not inside:
        if marks.answers and begun.startswith(marks.answers) and not begun.startswith(marks.opens):
            return "", begun[len(marks.answers) :].lstrip()
        if not begun.startswith(marks.opens):
            return "", text
        text = begun[len(marks.opens) :]
    thought, _, answer = text.partition(marks.closes)
    return thought.strip(), answer.lstrip()


@given(
    st.sampled_from(STYLES),
    st.lists(
        st.sampled_from(["opens", "closes", "answers", "<", "<th", "</", " ", "\n", "a", "word ", "é"]), max_size=8
    ),
    st.lists(st.integers(0, 5), max_size=8),
    st.booleans(),
)
def test_a_thought_is_told_apart_however_it_is_cut(
    marks: ThoughtMarks, parts: list[str], cuts: list[int], inside: bool
) -> None:
    text = "".join(getattr(marks, part, part) for part in parts)
    expected = reference(text, marks, inside=inside)
    for sizes in ([], cuts, [1] * len(text)):
        assert in_pieces(text, sizes, marks, inside=inside) == expected


def test_without_marks_all_is_answer() -> None:
    thoughts = ThoughtFilter(None)
    assert thoughts.feed(" <think>a</think>b") == ("", " <think>a</think>b")
    assert thoughts.flush() == ("", "")


@pytest.mark.parametrize("marks", STYLES)
def test_a_template_tells_its_marks(marks: ThoughtMarks) -> None:
    assert find_marks("{{ m.content.split('" + marks.closes + "')[-1] }}") is marks
    assert find_marks("{{ messages }}") is None


# The switch


def test_the_templates_own_switch(engine: LocalEngine) -> None:
    plain, on, off = (engine.encode_chat(MESSAGES, think=think) for think in (None, True, False))
    assert plain == on
    opens, closes = mark_ids(engine)
    assert off[: len(on)] == on
    assert [token for token in off[len(on) :] if token in (opens, closes)] == [opens, closes]


@pytest.mark.parametrize(
    ("template", "think", "message"),
    [
        ("{{ messages[0].content }}<think>\n", False, "no switch for thinking"),
        ("{{ messages[0].content }}", True, "does not think"),
    ],
)
def test_what_cannot_be_switched_says_so(starter_model: Path, template: str, think: bool, message: str) -> None:
    with open_vocabulary(starter_model) as vocabulary:
        prompts = PromptEncoder(vocabulary, template)
        with pytest.raises(TemplateError, match=message):
            prompts.encode_chat(MESSAGES, think)
        assert prompts.encode_chat(MESSAGES, not think) == prompts.encode_chat(MESSAGES)


# Replies


def test_a_thought_is_apart_from_the_answer(engine: LocalEngine) -> None:
    chunks = list(engine.chat(MESSAGES, thinks(engine, think_budget=7)))
    thought, answer = whole(chunks)
    assert thought
    assert answer
    assert not any(mark in thought + answer for mark in MARKS)
    stats = chunks[-1].stats
    assert stats.thought_tokens == 7
    ids = [chunk.token for chunk in chunks if chunk.token is not None]
    assert len(ids) == stats.generated_tokens == 24
    said = b"".join(engine._vocabulary.piece(token) for token in ids).decode()
    assert reference(said, STYLES[0], inside=False) == (thought, answer)
    assert [chunk.thinking for chunk in chunks[:9]] == [True] * 9


def test_a_budget_ends_a_thought_that_the_prompt_opened(starter_model: Path, tmp_path: Path) -> None:
    path = write_thinker(tmp_path, starter_model, "{{ messages[0].content }}<think>\n")
    with load(path, LoadOptions(context=512, gpu_layers=0, cache=0)) as engine:
        never_closed = replace(GREEDY, logit_bias=((mark_ids(engine)[1], -100.0),))
        for budget in (0, 1, 5):
            chunks = list(engine.chat(MESSAGES, replace(never_closed, think_budget=budget)))
            thought, answer = whole(chunks)
            assert (bool(thought), bool(answer)) == (bool(budget), True)
            assert chunks[-1].stats.thought_tokens == budget
        # without one all that comes is thought
        chunks = list(engine.chat(MESSAGES, never_closed))
        assert whole(chunks)[1] == ""
        assert chunks[-1].stats.thought_tokens == 24
        assert chunks[-1].finish_reason == "length"


def test_a_grammar_is_for_the_answer(engine: LocalEngine) -> None:
    grammar = 'root ::= "[" [0-9] [0-9] "]"'
    chunks = list(engine.chat(MESSAGES, thinks(engine, think_budget=6, grammar=grammar)))
    thought, answer = whole(chunks)
    assert thought
    assert chunks[-1].finish_reason == "stop"
    assert len(answer) == 4
    assert answer[1:3].isdigit()
    # who may not think, or does not begin with it, is held to it from the start
    for sampling in (replace(GREEDY, think=False, grammar=grammar), replace(GREEDY, grammar=grammar)):
        thought, answer = whole(list(engine.chat(MESSAGES, sampling)))
        assert (thought, answer[0], answer[-1]) == ("", "[", "]")


def test_stop_texts_are_for_the_answer(engine: LocalEngine) -> None:
    thought, answer = whole(list(engine.chat(MESSAGES, thinks(engine, think_budget=7))))
    assert whole(list(engine.chat(MESSAGES, thinks(engine, think_budget=7, stop=(thought[2:5],)))))[0] == thought
    stopped = whole(list(engine.chat(MESSAGES, thinks(engine, think_budget=7, stop=(answer[2:5],)))))
    assert stopped == (thought, answer[: answer.index(answer[2:5])])


def test_thoughts_are_left_out_of_the_conversation(engine: LocalEngine) -> None:
    session = ChatSession(engine, None, thinks(engine, think_budget=7))
    thought, answer = whole(list(session.reply("Name a river.")))
    assert thought
    kept = session.messages[-1]
    assert kept.content == answer
    assert b"".join(engine._vocabulary.piece(token) for token in kept.tokens).decode().lstrip() == answer
    list(session.reply("And another."))
    assert session.last_stats.cached_tokens >= len(engine.encode_chat(session.messages[:1])) - 1


def test_a_reply_that_is_all_thought_when_it_is_cancelled_is_taken_back(engine: LocalEngine) -> None:
    session = ChatSession(engine, None, thinks(engine))
    for chunk in session.reply("Name a river."):
        if chunk.stats.generated_tokens == 5:
            engine.cancel()
    assert chunk.finish_reason == "cancelled"
    assert session.messages == []


# The command line


def test_json_has_the_thought_apart(
    thinker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    options = ["--temperature", "0", "--max-tokens", "20", "--think", "on", "--think-budget", "4", "--cache", "off"]
    options += ["--presence-penalty", "10", "--repeat-penalty", "10"]
    with load(thinker, LoadOptions(context=512, gpu_layers=0, cache=0)) as engine:
        for token, bias in steering(engine)["logit_bias"]:
            options += ["--logit-bias", f"{token}={bias}"]
    assert cli.main(["run", str(thinker), "Name a river.", "--json", *options]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["thought"]
    assert said["text"]
    assert said["thought_tokens"] == 4
    # into a pipe goes the answer alone
    assert cli.main(["run", str(thinker), "Name a river.", *options]) == 0
    assert capsys.readouterr().out == said["text"]
    # and in a chat with another program each part has its name
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"content": "Name a river."}\n{"command": "/think off"}\n'))
    assert cli.main(["chat", str(thinker), "--json", *options]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(line["thought"] for line in lines if line.keys() == {"thought"}) == said["thought"]
    assert "".join(line["delta"] for line in lines if line.keys() == {"delta"}) == said["text"]
    assert lines[-2:] == [{"notice": "Thinking: off."}, {"done": "think"}]


def test_a_thought_on_a_terminal_is_dimmed_and_harmless() -> None:
    written: list[str] = []
    dimmed = Dimmed(written.append)
    dimmed.feed("")
    dimmed.feed("I \x1b[31mmuse")
    dimmed.feed(" on")
    dimmed.feed("", answer="So")
    dimmed.close()
    assert "".join(written) == "\x1b[2mI muse on\x1b[0m\n\n"
