"""Messages to tokens, through the model's own chat template.

What a person types is text. llama.cpp finds the marks of a turn by their text, so a message that holds such a
text (`<|im_end|>`) would end its own turn. Where one does, a character that occurs nowhere else is put inside
it before rendering, and the rendered text is cut there: no piece holds the mark any more, and the template saw
the message as long as it is. A reply's own ids take the place of its text by the same means.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice

from models.errors import TemplateError
from models.native import ATTR_USER_DEFINED, Vocabulary
from runner.engine.protocol import Message
from runner.engine.text_stream import shared_prefix, text_of
from runner.template import ChatTemplate
from runner.thinking import switch


class PromptEncoder:
    """Turns texts and conversations into the tokens that the model expects.

    `normalize` is applied to every text that a person or a file gives, not to replies kept by their ids. With
    `parse_special` marks in messages count as marks, as transformers has it.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        template: str | None,
        *,
        normalize: Callable[[str], str] = lambda text: text,
        parse_special: bool = False,
    ) -> None:
        self._vocabulary = vocabulary
        self._source = template
        self._template: ChatTemplate | None = None
        self._normalize = normalize
        self._parse_special = parse_special
        self._pattern: dict[bool, re.Pattern[str]] = {}

    @property
    def has_template(self) -> bool:
        return bool(self._source)

    def encode_text(self, text: str) -> list[int]:
        """Tokens of a text to be continued, with the marks that the model wants around it (BOS)."""
        return self._vocabulary.tokenize(self._normalize(text), add_special=True, parse_special=self._parse_special)

    def encode_chat(self, messages: Sequence[Message], think: bool | None = None) -> list[int]:
        """Tokens of a conversation up to where the assistant speaks. Raises TemplateError."""
        template = self._compiled()
        names = switch(template.source, template.reads, think)
        clean = [self._normalized(message) for message in messages]
        cut, edge = _unused_characters(template.source, clean)
        if not self._parse_special:
            clean = [replace(message, content=self._cut_marks(message, cut)) for message in clean]

        def render(turns: Sequence[Message]) -> str:
            return _render(template, turns, names)

        rendered = render(clean)
        kept = [i for i, message in enumerate(clean) if self._has_own_tokens(message, messages[i])]
        with_edges = _render_with_edges(render, clean, kept, edge, rendered) if kept else None
        if with_edges is None:
            return self._tokenize_pieces(rendered.split(cut))
        tokens: list[int] = []
        # Edges come in pairs: text, reply, text, reply, ..., text.
        for index, part in enumerate(with_edges.split(edge)):
            if index % 2:
                tokens += clean[kept[index // 2]].tokens
            else:
                tokens += self._tokenize_pieces(part.split(cut), continues=index > 0)
        return tokens

    def marks(self, messages: Sequence[Message], tokens: Sequence[int], think: bool | None = None) -> set[int]:
        """Where the tokens of later conversations may part from `tokens`, those of `messages`.

        After the system message; and where the reply begins, which a template may show otherwise later on.
        """
        system = messages[:1] if messages and messages[0].role == "system" else []
        later = [*messages, Message("assistant", "x"), Message("user", "y")]
        found = set()
        with suppress(TemplateError):  # a template that wants other turns has no such place
            found.add(shared_prefix(tokens, self.encode_chat(later, think)))
        with suppress(TemplateError):
            one, other = (self.encode_chat([*system, Message("user", text)], think) for text in ("x", "y"))
            found.add(shared_prefix(one, other))
        return found

    def _compiled(self) -> ChatTemplate:
        if not self._source:
            raise TemplateError(
                "this is a base model: it has no chat template, and so no way to tell who speaks",
                hint="`handmill run` continues a text with it",
            )
        if self._template is None:
            bos, eos = self._vocabulary.bos, self._vocabulary.eos
            self._template = ChatTemplate(
                self._source,
                bos="" if bos is None else self._vocabulary.text(bos),
                eos="" if eos is None else self._vocabulary.text(eos),
            )
        return self._template

    def _normalized(self, message: Message) -> Message:
        return message if message.tokens else replace(message, content=self._normalize(message.content))

    def _has_own_tokens(self, marked: Message, original: Message) -> bool:
        """Whether the ids that come with a reply are really those of its text (and of this model)."""
        if marked.role != "assistant" or not marked.tokens:
            return False
        if not all(0 <= token < self._vocabulary.n_tokens for token in marked.tokens):
            return False
        data = b"".join(self._vocabulary.piece(token) for token in marked.tokens)
        return text_of(data) == original.content

    def _cut_marks(self, message: Message, cut: str) -> str:
        """The content with `cut` inside every text that llama.cpp would take for a mark.

        A reply keeps what the vocabulary calls user-defined (`<think>`): those the model writes itself, and
        templates look for them.
        """
        user_defined = message.role != "assistant"
        if user_defined not in self._pattern:
            self._pattern[user_defined] = _marks_pattern(self._vocabulary, user_defined)
        # Lookahead, so that marks which overlap are all found; the cut comes after the first character of each.
        return self._pattern[user_defined].sub(lambda match: match[0] + cut, message.content)

    def _tokenize_pieces(self, pieces: Sequence[str], continues: bool = False) -> list[int]:
        """Tokens of a text given in pieces, the marks of each recognised, none across a border."""
        tokens: list[int] = []
        for index, piece in enumerate(pieces):
            if not piece:
                continue
            tokens += self._continued(piece) if continues or index else self._whole(piece)
        return tokens

    def _whole(self, text: str) -> list[int]:
        # The template writes BOS itself where the model wants it.
        return self._vocabulary.tokenize(text, add_special=False, parse_special=True)

    def _continued(self, text: str) -> list[int]:
        """Tokens of a text that does not begin a line of thought: without SentencePiece's leading space."""
        newline = self._whole("\n")
        if self._vocabulary.piece(newline[0])[:1] != b" ":
            return self._whole(text)
        both = self._whole("\n" + text)
        return both[len(newline) :] if both[: len(newline)] == newline else self._whole(text)


def marks_turns_with_plain_text(template: str, vocabulary: Vocabulary) -> bool:
    """Whether a template sets turns apart by text that anyone can type (`[INST]`, `USER:`).

    Nothing can protect such a model from a message that pretends to be two turns. False also for a template
    that does not render.
    """
    turns = [Message("user", "qwzx1"), Message("assistant", "qwzx2"), Message("user", "qwzx3")]
    bos, eos = vocabulary.bos, vocabulary.eos
    try:
        rendered = _render(
            ChatTemplate(
                template,
                bos="" if bos is None else vocabulary.text(bos),
                eos="" if eos is None else vocabulary.text(eos),
            ),
            turns,
        )
    except TemplateError:
        return False
    # The texts between one message and the next, and after the last one.
    gaps = re.split("|".join(turn.content for turn in turns), rendered)[1:]
    marks = _marks_pattern(vocabulary, user_defined=True)
    return any(not marks.search(gap) for gap in gaps)


def _marks_pattern(vocabulary: Vocabulary, user_defined: bool) -> re.Pattern[str]:
    """Finds the first character of each mark that can be cut.

    Runs of spaces or line ends are user-defined tokens in some vocabularies (Gemma); they mark nothing.
    """
    texts = [
        text
        for text, token in vocabulary.special_tokens.items()
        if len(text) > 1
        and text.replace("▁", " ").strip()
        and (user_defined or not vocabulary.attributes(token) & ATTR_USER_DEFINED)
    ]
    if not texts:
        return re.compile(r"(?!)")
    alternatives = "|".join(
        f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in sorted(texts, key=len, reverse=True)
    )
    return re.compile(alternatives)


def _render(template: ChatTemplate, messages: Sequence[Message], names: Mapping[str, object] | None = None) -> str:
    return template.render([{"role": message.role, "content": message.content} for message in messages], names or {})


def _render_with_edges(
    render: Callable[[Sequence[Message]], str], messages: Sequence[Message], kept: list[int], edge: str, plain: str
) -> str | None:
    """The rendered text with `edge` on both sides of each message of `kept`; None where that changes the rest.

    A template that trims replies, or takes the thoughts out of them, does not show them as they were: then
    those go by their text. `kept` loses the messages that had to be left out.
    """
    for candidates in (list(kept), [i for i in kept if _is_trimmed(messages[i].content)]):
        marked = [
            replace(message, content=f"{edge}{message.content}{edge}") if i in candidates else message
            for i, message in enumerate(messages)
        ]
        text = render(marked)
        parts = text.split(edge)
        if text.replace(edge, "") == plain and parts[1::2] == [messages[i].content for i in candidates]:
            kept[:] = candidates
            return text
    return None


def _is_trimmed(text: str) -> bool:
    return bool(text) and text == text.strip()


def _unused_characters(source: str, messages: Sequence[Message]) -> tuple[str, str]:
    """Two characters for private use that neither the template nor a message holds. Raises TemplateError."""
    used = set(source).union(*(message.content for message in messages))
    free = [char for char in map(chr, islice(_private_use(), len(used) + 2)) if char not in used]
    if len(free) < 2:
        raise TemplateError("the messages use every character for private use: none is left to protect them with")
    return free[0], free[1]


def _private_use() -> Iterator[int]:
    yield from range(0xE000, 0xF900)
    yield from range(0xF0000, 0xFFFFE)
