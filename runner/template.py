"""Chat templates, rendered as transformers renders them, and stopped when they do not end.

A template is a program that came with a stranger's file. Jinja2's sandbox keeps it from reaching anything, but
not from looping for ever or from asking for a string of a terabyte. Three things do: a budget of steps and of
processor time, held by a trace function; a bound on what one operation, filter or call may make, since no
trace sees inside it; a bound on the output.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from types import FrameType
from typing import TYPE_CHECKING, Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.errors import TemplateError
from models.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jinja2.parser import Parser

MAX_SOURCE = 1 << 20
MAX_STEPS = 400_000
"""Lines of Python that one rendering may run, the conversation's own size aside. Real templates take some
hundred, and about thirty a message; this many take about a third of a second."""
STEPS_A_MESSAGE = 2_000
MAX_SECONDS = 1.0
"""Of processor time, for steps that are slow each."""
MAX_LENGTH = 1 << 22
"""Characters of a string and elements of a list that any step may make."""
MAX_MADE = 1 << 29
"""The same of all steps of one rendering together: what it could hold on to at most."""
MAX_PRODUCT = 1 << 28
"""The sizes of everything given to one call, multiplied: an upper bound of what it makes of them."""
MAX_INTEGER_BITS = 4096
MAX_CALL_INTEGER = 100_000
UNKNOWN_LENGTH = 100_000
"""What an iterator counts as: Jinja2's sandbox lets no range be longer."""
_LONG_NUMBER = re.compile(r"\d{5}")


_made = threading.local()


class _TooMuch(SecurityError):
    """The template asks for more time or memory than any real one needs."""


def _size(value: object) -> int:
    if isinstance(value, (str, bytes, list, tuple, dict, range)):
        return len(value)
    return UNKNOWN_LENGTH if hasattr(value, "__next__") else 1


def _guard(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Refuse a call whose result could be huge, going by its arguments."""
    product = 1
    for value in (*args, *kwargs.values()):
        if isinstance(value, int):
            if abs(value) > MAX_CALL_INTEGER:
                raise _TooMuch(f"{name} is called with the number {abs(value):.3g}")
            product *= max(1, abs(value))
        else:
            product *= max(1, _size(value))
        # A format's width makes a long string of a short one: "%99999999d", "{:>99999999}".
        if isinstance(value, str) and "format" in name and _LONG_NUMBER.search(value):
            raise _TooMuch(f"{name} asks for a very wide field")
    if product > MAX_PRODUCT:
        raise _TooMuch(f"{name} may make something very large")


def _bounded(value: Any) -> Any:
    """`value`, which a step made: refused when it is huge, or when all of this rendering together is."""
    size = _size(value)
    _made.total = getattr(_made, "total", 0) + size
    if size > MAX_LENGTH or _made.total > MAX_MADE:
        raise _TooMuch("it makes something very large")
    return value


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps Jinja2's marks of which functions want the environment first
    def call(*args: Any, **kwargs: Any) -> Any:
        _guard(name, args, kwargs)
        return _bounded(function(*args, **kwargs))

    return call


class _CodeGenerator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """`a ~ b`, through a function that bounds it: Jinja2 offers no hook for it."""
        self.write("environment.join_bounded((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _CodeGenerator

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            if _size(left) + _size(right) > MAX_LENGTH:
                raise _TooMuch("it adds up something very large")
            return _bounded(super().call_binop(context, operator, left, right))
        if operator == "%":
            if isinstance(left, str):
                _guard("format %", [left, *(right if isinstance(right, (tuple, list)) else [right])], {})
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1)
            if bits + (right.bit_length() if operator == "*" else 0) > MAX_INTEGER_BITS:
                raise _TooMuch("it computes a number of very many digits")
        elif operator == "*" and _size(left) * _size(right) * _times(left, right) > MAX_LENGTH:
            raise _TooMuch("it repeats something very often")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        # Of a string's method the string itself; the sandbox wraps `format`.
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        given = [*args, owner] if isinstance(owner, (str, bytes, list, tuple)) else args
        _guard(getattr(function, "__name__", "a call"), given, kwargs)
        return _bounded(super().call(context, function, *args, **kwargs))

    def join_bounded(self, parts: Sequence[Any]) -> str:
        return str(_bounded("".join(map(str, parts))))


def _times(left: object, right: object) -> int:
    return max(1, *(abs(value) for value in (left, right) if isinstance(value, int)), 1)


class _Generation(Extension):
    """`{% generation %}`: marks the assistant's own words for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012  (Jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> None:
    raise JinjaError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int) and indent > 64:
        raise _TooMuch("tojson is asked to indent very far")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    for name, function in list(environment.filters.items()):
        environment.filters[name] = _guarded(f"{name} (a format)" if name == "format" else name, function)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _guarded("strftime_now (a format)", _strftime_now)
    return environment


@contextmanager
def _step_budget(steps: int) -> Iterator[None]:
    """Raise _TooMuch in whatever Python code of this thread runs the last step."""
    left = steps
    deadline = time.thread_time() + MAX_SECONDS

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        nonlocal left
        left -= 1
        if left < 0:
            raise _TooMuch(f"it takes more than {steps} steps")
        if left % 16 == 0 and time.thread_time() > deadline:
            raise _TooMuch(f"it computes for more than {MAX_SECONDS:g} s")
        return trace

    before = sys.gettrace()
    _made.total = 0
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class ChatTemplate:
    """A compiled chat template. Raises TemplateError for one that Jinja2 cannot read."""

    def __init__(self, source: str, *, bos: str = "", eos: str = "") -> None:
        self.source = source
        self._names = {"bos_token": bos, "eos_token": eos}
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template is {len(source)} characters long")
        try:
            self._template = _environment().from_string(source)
        except (JinjaError, RecursionError, SyntaxError, MemoryError, ValueError) as error:
            raise TemplateError(f"the chat template cannot be read: {printable(error)}", hint=_HINT) from error

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The conversation as one text. Raises TemplateError when the template raises or does not end."""
        try:
            with _step_budget(MAX_STEPS + STEPS_A_MESSAGE * len(messages)):
                text = self._template.render(
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=add_generation_prompt,
                    tools=None,
                    documents=None,
                    **self._names,
                )
            _bounded(text)
        except _TooMuch as error:
            raise TemplateError(f"the chat template was stopped: {printable(error)}", hint=_HINT) from error
        except Exception as error:  # whatever a stranger's program may raise: a type error, a recursion ...
            said = printable(error) or type(error).__name__
            hint = _SYSTEM_HINT if messages and messages[0].get("role") == "system" else _HINT
            raise TemplateError(f"the chat template says: {said}", hint=hint) from error
        return text


_HINT = "the template is part of the model file; another conversion of the model may have a sound one"
_SYSTEM_HINT = "some templates take no system message: try without --system"
