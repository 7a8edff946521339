"""Grammars from files: GBNF as it is, and JSON schemas.

llama-cpp-python turns a schema into a grammar, and passes over what it does not know. A reply must be valid for all
that the schema says: so what would be passed over is refused here by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import UsageError
from models.text import printable
from runner.engine.gbnf import MAX_SIZE

_ANNOTATIONS = {"$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated"}
_KEYWORDS = {
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
    "string": {"minLength", "maxLength", "format"},
    "integer": set[str](),
    "number": set[str](),
    "boolean": set[str](),
    "null": set[str](),
}
"""What may stand beside a type."""
_FORMATS = {"date", "time", "date-time", "uuid"}
_ALONE = ("$ref", "anyOf", "oneOf", "const", "enum")
"""Each of these says all that there is to say of a value."""
_DEFINITIONS = {"$defs", "definitions"}
_REFERENCE = re.compile(r"#/(\$defs|definitions)/[^/]+")
_CHAR = re.compile(r"^char ::= .*$", re.MULTILINE)
_JSON_CHAR = (
    r'char ::= [^"\\\x00-\x1F] | "\\" (["\\/bfnrt] | "u" '
    r"([0-9a-cA-CefEF] [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F] | [dD] [0-7] [0-9a-fA-F] [0-9a-fA-F]))"
)
"""No control character and no half of a surrogate pair, which JSON does not have."""


def grammar_of_schema(schema: str) -> str:
    """The GBNF of the JSON that a schema allows. Raises UsageError for what it cannot hold a reply to."""
    try:
        clean = json.dumps(_checked(json.loads(schema), "schema"))
        from llama_cpp.llama_grammar import json_schema_to_gbnf

        grammar = str(json_schema_to_gbnf(clean))
    except RecursionError as error:
        raise UsageError("the JSON schema is nested too deep") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"the JSON schema is no JSON: {printable(error, 200)}") from error
    except UsageError:
        raise
    except Exception as error:  # it raises whatever happens to it
        raise UsageError(f"the JSON schema cannot be used: {printable(error, 300) or type(error).__name__}") from error
    return _CHAR.sub(lambda _: _JSON_CHAR, grammar)


def grammar_from_files(grammar: Path | None, schema: Path | None) -> str | None:
    """What `--grammar` or `--json-schema` asks for. Raises UsageError."""
    if grammar is not None and schema is not None:
        raise UsageError("--grammar and --json-schema exclude each other")
    if schema is not None:
        return grammar_of_schema(_read(schema, "--json-schema"))
    return None if grammar is None else _read(grammar, "--grammar")


def _checked(schema: object, place: str) -> dict[str, Any]:
    """The schema without what says nothing, every part of it of a kind that becomes a grammar."""
    if not isinstance(schema, dict):
        raise UsageError(f"{printable(place, 200)}: a JSON schema is an object here, not {printable(schema, 40)}")
    fields = {name: value for name, value in schema.items() if name not in _ANNOTATIONS}
    definitions = {name: fields.pop(name) for name in _DEFINITIONS & fields.keys()}
    checked = _value(fields, place)
    for name, entries in definitions.items():
        if not isinstance(entries, dict):
            raise UsageError(f"{place}/{name} is no object")
        checked[name] = {key: _checked(entry, f"{place}/{name}/{key}") for key, entry in entries.items()}
    return checked


def _value(fields: Mapping[str, Any], place: str) -> dict[str, Any]:
    alone = next((name for name in _ALONE if name in fields), None)
    if alone is not None:
        _only(fields, {alone, "type"} if alone in ("const", "enum") else {alone}, place)
        return _alone(alone, fields[alone], place)
    kind = fields.get("type", "object" if "properties" in fields else None)
    if isinstance(kind, list):
        each = [{name: v for name, v in fields.items() if name in _KEYWORDS.get(one, ())} for one in kind]
        _only(fields, {"type"}.union(*each), place)
        return {"anyOf": [_value({**f, "type": one}, place) for one, f in zip(kind, each, strict=True)]}
    if not isinstance(kind, str) or kind not in _KEYWORDS:
        raise UsageError(f"{printable(place, 200)}: the type {printable(kind, 40)} is none of {', '.join(_KEYWORDS)}")
    _only(fields, {"type", *_KEYWORDS[kind]}, place)
    checked: dict[str, Any] = {**fields, "type": kind}
    if kind == "string" and checked.get("format", "date") not in _FORMATS:
        raise UsageError(f"{printable(place, 200)}: the format {printable(checked['format'], 40)} is not known")
    if kind == "array":
        if "items" in checked:
            checked["items"] = _checked(checked["items"], f"{place}/items")
        if "prefixItems" in checked:
            _only(fields, {"type", "prefixItems"}, place)
            checked["prefixItems"] = [_checked(entry, f"{place}/prefixItems") for entry in checked["prefixItems"]]
    if kind == "object" and "properties" in checked:
        names = checked["properties"]
        if unknown := [name for name in checked.get("required", ()) if name not in names]:
            raise UsageError(f"{printable(place, 200)}: {printable(unknown[0], 40)!r} is required, and no property")
        checked["properties"] = {name: _checked(entry, f"{place}/{name}") for name, entry in names.items()}
        checked["additionalProperties"] = False  # fewer replies, and all of them valid
    return checked


def _alone(name: str, value: Any, place: str) -> dict[str, Any]:
    if name in ("anyOf", "oneOf"):
        choices = [_checked(entry, f"{place}/{name}") for entry in value]
        kinds = [choice.get("type") for choice in choices]
        if name == "oneOf" and (None in kinds or len(set(kinds)) < len(kinds)):
            raise UsageError(
                f"{printable(place, 200)}: oneOf", hint="Write anyOf, or alternatives of different types."
            )
        return {"anyOf": choices}
    if name == "$ref" and not (isinstance(value, str) and _REFERENCE.fullmatch(value)):
        raise UsageError(f"{printable(place, 200)}: {printable(value, 80)} names no definition", hint="#/$defs/NAME")
    return {name: value}


def _only(fields: Mapping[str, Any], known: set[str], place: str) -> None:
    if unknown := sorted(fields.keys() - known):
        raise UsageError(
            f"{printable(place, 200)}: {printable(unknown[0], 40)!r} cannot be held to here",
            hint="Leave it out of the schema, and check the reply for it.",
        )


def _read(path: Path, option: str) -> str:
    try:
        if path.stat().st_size > MAX_SIZE:
            raise UsageError(f"{option}: {path} is larger than {MAX_SIZE} bytes")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{option}: cannot read {path}: {error.strerror}", path=path) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{option}: {path} is no UTF-8 text", path=path) from error
