"""Chat templates, rendered as transformers renders them, and stopped when they do not end.

A template is a program that came with a stranger's file. Jinja2's sandbox keeps it from reaching anything, but
not from looping for ever or from asking for a string of a terabyte. Two things do: a budget of steps and of
processor time, held by a trace function; and, since no trace sees inside one, a bound on what one operation,
literal, filter, call or block of output may make. A container counts with all that is in it, as often as it is
in it: whoever prints or compares it walks through all of that in a single step.
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
from itertools import chain
from string import Formatter
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Any

from jinja2 import meta, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from models.errors import TemplateError
from models.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from jinja2.parser import Parser

MAX_SOURCE = 1 << 20
MAX_STEPS = 400_000
"""Lines of Python that one rendering may run, the conversation's own size aside. Real templates take some
hundred, and about thirty a message; this many take about a third of a second."""
STEPS_A_MESSAGE = 2_000
MAX_SECONDS = 1.0
"""Of processor time, for steps that are slow each."""
MAX_LENGTH = 1 << 22
"""Characters of a string, and elements of a list with all that is in them, that any step may make."""
MAX_MADE = 1 << 29
"""Bytes, about, that all steps of one rendering may make together: what it could hold on to at most."""
MAX_PRODUCT = 1 << 28
"""The sizes of everything given to one call, multiplied: an upper bound of what it makes of them."""
MAX_INTEGER_BITS = 4096
MAX_CALL_INTEGER = 100_000
UNKNOWN_LENGTH = 100_000
"""What an iterator counts as: Jinja2's sandbox lets no range be longer."""
_NUMBER = re.compile(r"\d+")
_FORMATS = frozenset({"format", "format_map", "strftime_now"})
"""What takes a pattern, first, in which a width makes a long string of a short one: "%99999999d"."""
_LOCALS = frozenset({"_loop_vars", "_block_vars"})
"""What Jinja2 itself adds to the arguments of a call, and takes away again: the names set around it."""
_VIEWS: tuple[type[Any], ...] = (type({}.keys()), type({}.values()), type({}.items()))
_NO_NAMES: Mapping[str, object] = MappingProxyType({})
_CONTAINERS: tuple[type[Any], ...] = (list, tuple, dict, MappingProxyType, *_VIEWS)


class _Made(threading.local):
    """What the rendering of this thread made so far."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.total = 0
        self.weights: dict[int, tuple[int, object]] = {}  # by id, beside the container: it keeps its id that way


_made = _Made()


class _TooMuch(SecurityError):
    """The template asks for more time or memory than any real one needs."""


def _size(value: object) -> int:
    if isinstance(value, (str, bytes, list, tuple, dict, range)):
        return len(value)
    return UNKNOWN_LENGTH if hasattr(value, "__next__") else 1


def _weight(value: Any) -> int:
    """Characters and elements that a walk through `value` meets, what is in it twice counted twice.

    The sandbox lets nobody change a container, so none contains itself and a weight once taken stays true.
    A namespace can be changed; but nothing walks through one, see _Namespace.
    """
    if isinstance(value, (str, bytes)):
        return 1 + len(value)
    if isinstance(value, int):
        return 1 + value.bit_length() // 3
    if not isinstance(value, _CONTAINERS):
        return 1
    if id(value) in _made.weights:
        return _made.weights[id(value)][0]
    mapping = value.mapping if isinstance(value, _VIEWS) else value
    is_mapping = isinstance(mapping, (dict, MappingProxyType))
    parts = [*chain(mapping.keys(), mapping.values())] if is_mapping else value
    weight = 1 + len(parts)
    kinds = set(map(type, parts))
    if kinds <= {str}:  # without a step for each
        weight += sum(map(len, parts))
    elif kinds <= {int}:
        weight += sum(map(int.bit_length, parts)) // 3
    else:
        weight += sum(map(_weight, parts))
    _made.weights[id(value)] = weight, value
    return weight


def _guard(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Refuse a call whose result could be huge, going by its arguments."""
    product = 1
    prints = name in _FORMATS or name == "replace"
    for value in (*args, *kwargs.values()):
        if isinstance(value, int):
            if abs(value) > MAX_CALL_INTEGER:
                raise _TooMuch(f"{name} is called with the number {abs(value):.3g}")
            product *= max(1, abs(value))
        else:
            product *= max(1, _weight(value) if prints and isinstance(value, _CONTAINERS) else _size(value))
    if name in _FORMATS and args:
        pattern = args[0]
        if not isinstance(pattern, str) or sum(map(int, _NUMBER.findall(pattern))) > MAX_LENGTH:
            raise _TooMuch(f"{name} asks for very wide fields, or with no string")
    if name == "sum" and isinstance(kwargs.get("start", args[3] if len(args) > 3 else 0), _CONTAINERS):
        raise _TooMuch("sum copies every list that it adds up")
    if product > MAX_PRODUCT:
        raise _TooMuch(f"{name} may make something very large")


def _refuse_nested_fields(pattern: str) -> None:
    """A field in a field's width, "{:>{}}", takes a number from anywhere: out of a list, out of a dictionary."""
    for _, _, spec, _ in Formatter().parse(pattern):
        if spec and "{" in spec:
            raise _TooMuch("format takes the width of a field from its arguments")


def _bounded(value: Any) -> Any:
    """`value`, which a step made: refused when it is huge, or when all of this rendering together is."""
    size = _size(value)
    _made.total += size
    if isinstance(value, _CONTAINERS):
        _made.total += 7 * size
        size = _weight(value)
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

    # What makes a container, or a copy, without a filter, a call or an operator.

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.write("environment.bounded(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx != "load":  # the names that a loop or an assignment sets
            super().visit_Tuple(node, frame)
            return
        self.write("environment.bounded(")
        super().visit_Tuple(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.bounded(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.bounded(")
        super().visit_Getitem(node, frame)
        self.write(")")


class _Namespace(Namespace):
    """A namespace that prints without what is in it: what is set there later may hold anything, itself too."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _concat(parts: Iterable[str]) -> str:
    """Joins the pieces of output: of the template, of a macro, of a `{% set %}` block."""
    pieces = list(parts)
    if sum(map(len, pieces)) > MAX_LENGTH:
        raise _TooMuch("it prints something very large")
    return str(_bounded("".join(pieces)))


class _Environment(ImmutableSandboxedEnvironment):
    bounded = staticmethod(_bounded)
    concat = staticmethod(_concat)
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _CodeGenerator

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            if _size(left) + _size(right) > MAX_LENGTH:
                raise _TooMuch("it adds up something very large")
            return _bounded(super().call_binop(context, operator, left, right))
        if operator == "%":
            if isinstance(left, str):
                _guard("format", [left, *(right if isinstance(right, (tuple, list)) else [right])], {})
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1)
            if bits + (right.bit_length() if operator == "*" else 0) > MAX_INTEGER_BITS:
                raise _TooMuch("it computes a number of very many digits")
        elif operator == "*" and _size(left) * _size(right) * _times(left, right) > MAX_LENGTH:
            raise _TooMuch("it repeats something very often")
        return _bounded(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        # Of a string's method the string itself; the sandbox wraps `format`.
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        given = [owner, *args] if isinstance(owner, (str, bytes, list, tuple)) else args
        name = getattr(function, "__name__", "a call")
        named = {key: kwargs[key] for key in kwargs.keys() - _LOCALS}
        _guard(name, given, named)
        if isinstance(owner, str):
            if name in _FORMATS:
                _refuse_nested_fields(owner)
        elif sum(map(_weight, (*args, *named.values()))) > MAX_LENGTH:  # a macro keeps them
            raise _TooMuch(f"{name} is given something very large")
        return _bounded(super().call(context, function, *args, **kwargs))

    def join_bounded(self, parts: Sequence[Any]) -> str:
        return _concat(map(str, parts))


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
        environment.filters[name] = _guarded(name, function)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _guarded("strftime_now", _strftime_now)
    environment.globals["namespace"] = _Namespace
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
    _made.forget()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
        _made.forget()


class ChatTemplate:
    """A compiled chat template. Raises TemplateError for one that Jinja2 cannot read."""

    def __init__(self, source: str, *, bos: str = "", eos: str = "") -> None:
        self.source = source
        self._names = {"bos_token": bos, "eos_token": eos}
        self._reads: set[str] | None = None
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template is {len(source)} characters long")
        _made.forget()
        try:
            self._template = _environment().from_string(source)
        except (JinjaError, RecursionError, SyntaxError, MemoryError, ValueError) as error:
            raise TemplateError(f"the chat template cannot be read: {printable(error)}", hint=_HINT) from error
        finally:
            _made.forget()

    def reads(self, name: str) -> bool:
        """Whether the template looks at a variable of that name before it sets one."""
        if self._reads is None:
            try:
                self._reads = meta.find_undeclared_variables(_environment().parse(self.source))
            except (JinjaError, RecursionError):  # it was compiled, so this is the search's own limit
                self._reads = set()
            finally:
                _made.forget()
        return name in self._reads

    def render(self, messages: Sequence[Mapping[str, str]], names: Mapping[str, object] = _NO_NAMES) -> str:
        """The conversation as one text, up to where the assistant speaks.

        `names` are further variables. Raises TemplateError when the template raises or does not end.
        """
        try:
            with _step_budget(MAX_STEPS + STEPS_A_MESSAGE * len(messages)):
                text = self._template.render(
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=True,
                    tools=None,
                    documents=None,
                    **self._names,
                    **names,
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
