"""Models that think before they answer: the template's own switch, and the thought set apart from the answer.

A thought stands between two marks at the beginning of a reply, or of the prompt's end where the template writes the
first one itself. Which marks: those of the families below that the template knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from models.errors import TemplateError
from runner.engine.text_stream import overlap

SWITCHES: Mapping[str, tuple[object, object]] = {
    "enable_thinking": (False, True),
    "thinking": (False, True),
    "reasoning": (False, True),
    "thinking_option": ("off", "on"),
    "thinking_mode": ("disabled", "enabled"),
    "thinking_budget": (0, -1),
}
"""Variables by which templates switch thinking, and their values for off and on: Qwen and most others; DeepSeek and
Granite; Cohere; Ling; MiniMax; Seed-OSS."""


@dataclass(frozen=True)
class ThoughtMarks:
    """The texts around a thought. `answers` may stand before an answer without one, and is no part of it."""

    opens: str
    closes: str
    answers: str = ""
    after: str = ""
    """What a model writes between the second mark and the answer."""


STYLES = (
    ThoughtMarks("<think>", "</think>", after="\n\n"),
    ThoughtMarks(
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        answers="<|channel|>final<|message|>",
    ),
    ThoughtMarks("<|channel>thought\n", "<channel|>"),
    ThoughtMarks("[THINK]", "[/THINK]"),
    ThoughtMarks("<seed:think>", "</seed:think>"),
    ThoughtMarks("<mm:think>", "</mm:think>"),
    ThoughtMarks("<|START_THINKING|>", "<|END_THINKING|>", answers="<|START_RESPONSE|>"),
    ThoughtMarks("<|inner_prefix|>", "<|inner_suffix|>"),
    ThoughtMarks("<thought>", "</thought>"),
)
"""Most models; gpt-oss; Gemma 4; Mistral; Seed-OSS; MiniMax M3; Cohere; Apertus; EXAONE Deep."""


def find_marks(template: str) -> ThoughtMarks | None:
    """The marks that a template knows; None for a model that does not think."""
    return next((marks for marks in STYLES if marks.closes in template or marks.opens in template), None)


def switch(template: str, reads: Callable[[str], bool], think: bool | None) -> dict[str, object]:
    """The variables that make a template switch thinking on or off.

    `reads` tells whether the template looks at a variable. Raises TemplateError where it cannot be switched so.
    """
    if think is None:
        return {}
    found = {name: values[think] for name, values in SWITCHES.items() if reads(name)}
    thinks = find_marks(template) is not None
    if not found and thinks != think:
        if think:
            raise TemplateError("this model does not think: its chat template knows no thoughts", hint="leave --think")
        raise TemplateError(
            "the chat template has no switch for thinking",
            hint="--think-budget 0 ends every thought at once; some models take /no_think in --system",
        )
    return found


class _State(Enum):
    START = auto()
    """Nothing yet but space, or what may become a mark."""
    THOUGHT = auto()
    AFTER = auto()
    """Between the thought and the first word of the answer."""
    ANSWER = auto()


class ThoughtFilter:
    """Takes a reply piece by piece, and tells the thought from the answer; a mark may be split over pieces.

    Without `marks` all is answer. With `inside` the prompt has opened the thought. Neither part has space around it.
    """

    def __init__(self, marks: ThoughtMarks | None, *, inside: bool = False) -> None:
        self._marks = marks or ThoughtMarks("", "")
        self._state = _State.ANSWER if marks is None else _State.THOUGHT if inside else _State.START
        self._waiting = ""
        self._said = False

    @property
    def inside(self) -> bool:
        """Whether a thought is open."""
        return self._state is _State.THOUGHT

    @property
    def thinking(self) -> bool:
        """Whether the answer is still to begin after a thought."""
        return self._state in (_State.THOUGHT, _State.AFTER)

    @property
    def undecided(self) -> bool:
        """Whether this reply may still turn out to begin with a thought."""
        return self._state is _State.START

    def feed(self, text: str) -> tuple[str, str]:
        """What of all text so far is known to be thought, and what answer."""
        if self._state is _State.ANSWER:
            return "", text
        self._waiting += text
        if self._state is _State.START and not self._decide():
            return "", ""
        thought = self._thought() if self._state is _State.THOUGHT else ""
        if self._state is _State.AFTER and (answer := self._waiting.lstrip()):
            self._waiting, self._state = answer, _State.ANSWER
        return thought, self._take() if self._state is _State.ANSWER else ""

    def flush(self) -> tuple[str, str]:
        """What still waits, at the end of a reply."""
        inside, waiting = self.inside, self._take()
        return (waiting.rstrip(), "") if inside else ("", waiting if self._state is _State.START else "")

    def _decide(self) -> bool:
        begun = self._waiting.lstrip()
        for mark, state in ((self._marks.opens, _State.THOUGHT), (self._marks.answers, _State.AFTER)):
            if mark and begun.startswith(mark):
                self._waiting, self._state = begun[len(mark) :], state
                return True
        if any(mark.startswith(begun) for mark in (self._marks.opens, self._marks.answers) if mark):
            return False
        self._state = _State.ANSWER
        return True

    def _thought(self) -> str:
        if not self._said:
            self._waiting = self._waiting.lstrip()
        thought, found, rest = self._waiting.partition(self._marks.closes)
        if not found:
            thought = thought[: len(thought) - overlap(thought, self._marks.closes)]
        thought = thought.rstrip()
        self._waiting = rest if found else self._waiting[len(thought) :]
        self._state = _State.AFTER if found else _State.THOUGHT
        self._said = self._said or bool(thought)
        return thought

    def _take(self) -> str:
        waiting, self._waiting = self._waiting, ""
        return waiting
