"""What llama.cpp does not survive in a grammar, found before it reads it.

llama.cpp reads a grammar by recursion, follows every way through the beginnings of its rules, and looks for left
recursion only where an empty alternative stands there in so many words. So a grammar can end the process (a deep
nesting) or keep it busy for ever, growing. What is refused here is sure to; mistakes of spelling are left to
llama.cpp, whose words for them are better.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from models.errors import UsageError

MAX_SIZE = 1 << 19
MAX_NESTING = 500
MAX_WAYS = 200_000
"""Ways through the beginnings of a rule's alternatives, each rule in them counted as often as it is met."""
MAX_CHAIN = 2_000
"""Rules that begin with one another."""

_TOKEN = re.compile(
    r"""(?P<skip>(?:\s|\#[^\r\n]*)+)
    | (?P<literal>"(?:[^"\\]|\\.)*")
    | (?P<chars>\[(?:[^\]\\]|\\.)*\])
    | (?P<token>!?<[^>]*>)
    | (?P<rule>[A-Za-z0-9-]+)\s*::=
    | (?P<name>[A-Za-z0-9-]+)
    | (?P<repeat>[*+?]|\{[^}]*\})
    | (?P<mark>[().|])""",
    re.VERBOSE | re.DOTALL,
)
_Sequence = list["str | None"]
"""What an alternative is made of: the names of rules, and None for a character."""


@dataclass
class _Open:
    """A rule, or a group, that is being read."""

    name: str
    alternatives: list[_Sequence] = field(default_factory=lambda: [[]])


def check_grammar(text: str) -> None:
    """Raise UsageError for a GBNF grammar with which llama.cpp would not come to an end."""
    if len(text) > MAX_SIZE:
        raise _refused(f"it is {len(text)} characters long, more than {MAX_SIZE}")
    if "\0" in text or not text.strip():
        raise _refused("it is empty" if not text.strip() else "it holds a NUL character")
    rules = _rules(text)
    if rules is None:
        return
    if "root" not in rules:
        raise _refused("it has no rule `root`")
    nullable = _least(rules, lambda item, known: item in known)
    ends = _least(rules, lambda item, known: item is None or item in known)
    if "root" not in ends and all(
        name in rules for sequences in rules.values() for row in sequences for name in row if name
    ):
        raise _refused("no text is ever complete by its rule `root`")
    if name := _grows(rules, nullable):
        raise _refused(f"left recursion: rule {name!r} comes back to itself before any character")
    _check_ways(rules)


def _refused(why: str) -> UsageError:
    return UsageError(f"the grammar cannot be used: {why}", option="grammar")


def tokens(text: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of every piece of a grammar, the blanks too; ends where it cannot be read."""
    position = 0
    while position < len(text) and (match := _TOKEN.match(text, position)):
        yield str(match.lastgroup), match[0]
        position = match.end()
    if position < len(text):
        yield "unknown", text[position:]


def _rules(text: str) -> Mapping[str, list[_Sequence]] | None:
    """Each rule's alternatives, groups and repetitions as rules of their own; None where the text is no grammar."""
    rules: dict[str, list[_Sequence]] = {}
    stack: list[_Open] = []
    made = 0
    for kind, piece in tokens(text):
        if kind == "skip":
            continue
        if kind == "rule":
            if len(stack) > 1:
                return None
            name = piece[:-3].rstrip()
            stack = [_Open(name)]
            rules[name] = stack[0].alternatives
            continue
        if kind == "unknown" or not stack:
            return None
        row = stack[-1].alternatives[-1]
        if kind == "token":
            raise _refused(f"it names a token ({piece[:40]}), and llama.cpp ends the process over some of those")
        if kind == "literal":
            row.extend([None] * (len(piece) > 2))
        elif kind == "chars" or piece == ".":
            row.extend([None] * (piece not in ("[]", "[^]")))  # llama.cpp takes these for nothing at all
        elif kind == "name":
            row.append(piece)
        elif piece == "|":
            stack[-1].alternatives.append([])
        elif piece == "(":
            made += 1
            stack.append(_Open(f"group {made} of {stack[0].name}"))
            if len(stack) > MAX_NESTING:
                raise _refused(f"its groups are nested more than {MAX_NESTING} deep")
        elif piece == ")":
            if len(stack) < 2:
                return None
            group = stack.pop()
            rules[group.name] = group.alternatives
            stack[-1].alternatives[-1].append(group.name)
        elif row:  # a repetition of what came last
            made += 1
            name = f"repetition {made} of {stack[0].name}"
            rules[name] = _repetition(name, row[-1], piece)
            row[-1] = name
    return rules if len(stack) == 1 else None


def _repetition(name: str, item: str | None, sign: str) -> list[_Sequence]:
    least = {"*": 0, "?": 0, "+": 1}.get(sign)
    if least is None:
        least = 0 if re.match(r"\{\s*0+\s*[,}]", sign) else 1
    again: _Sequence = [item] if sign == "?" else [item, name]
    return [again, []] if least == 0 else [again, [item]]


def _least(rules: Mapping[str, list[_Sequence]], holds: object) -> set[str]:
    """The smallest set of rules of which one alternative has nothing but items that hold, given the set so far."""
    assert callable(holds)
    known: set[str] = set()
    while True:
        more = {
            name
            for name, rows in rules.items()
            if name not in known and any(all(holds(item, known) for item in row) for row in rows)
        }
        if not more:
            return known
        known |= more


def _grows(rules: Mapping[str, list[_Sequence]], nullable: set[str]) -> str | None:
    """A rule that can come first in itself with something left to do after it, which llama.cpp would pile up."""
    edges: dict[str, set[str]] = {name: set() for name in rules}
    leaving: list[tuple[str, str]] = []
    for name, rows in rules.items():
        for row in rows:
            for position, item in enumerate(row):
                if item is None or item not in rules:
                    break
                edges[name].add(item)
                if position + 1 < len(row):
                    leaving.append((name, item))
                if item not in nullable:
                    break
    component = _components(edges)
    return next((name for name, item in leaving if component[name] == component[item]), None)


def _components(edges: Mapping[str, set[str]]) -> Mapping[str, int]:
    """The number of the strongly connected component that each node is in."""
    order: list[str] = []
    seen: set[str] = set()
    for root in edges:
        stack = [(root, iter(edges[root]))] if root not in seen else []
        seen.add(root)
        while stack:
            node, ahead = stack[-1]
            following = next((other for other in ahead if other not in seen), None)
            if following is None:
                order.append(node)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(edges[following])))
    back: dict[str, list[str]] = {name: [] for name in edges}
    for name, others in edges.items():
        for other in others:
            back[other].append(name)
    number: dict[str, int] = {}
    for index, root in enumerate(reversed(order)):
        todo = [root] if root not in number else []
        while todo:
            node = todo.pop()
            if node not in number:
                number[node] = index
                todo.extend(back[node])
    return number


def _check_ways(rules: Mapping[str, list[_Sequence]]) -> None:
    """Refuse a grammar of whose rules llama.cpp would follow too many beginnings, or too long chains of them."""
    empty = {name for name, rows in rules.items() if [] in rows}
    first: dict[str, list[str]] = {name: [] for name in rules}
    for name, rows in rules.items():
        for row in rows:
            for item in row:
                if item is None or item not in rules:
                    break
                first[name].append(item)
                if item not in empty:
                    break
    ways: dict[str, int] = {}
    chain: dict[str, int] = {}
    for root in rules:
        stack = [] if root in ways else [(root, iter(first[root]))]
        open_ = {root}
        while stack:
            node, ahead = stack[-1]
            following = next((other for other in ahead if other not in ways and other not in open_), None)
            if following is not None:
                open_.add(following)
                stack.append((following, iter(first[following])))
                continue
            ways[node] = 1 + sum(ways.get(other, 1) for other in first[node])
            chain[node] = 1 + max((chain.get(other, 1) for other in first[node]), default=0)
            if ways[node] > MAX_WAYS or chain[node] > MAX_CHAIN:
                raise _refused(f"rule {node!r} can begin in too many ways")
            stack.pop()
