"""Grammars from files: GBNF as it is, and JSON schemas."""

from __future__ import annotations

import json
from pathlib import Path

from models.errors import UsageError
from models.text import printable
from runner.engine.gbnf import MAX_SIZE


def grammar_of_schema(schema: str) -> str:
    """The GBNF of the JSON that a schema allows, by llama-cpp-python. Raises UsageError."""
    try:
        if not isinstance(json.loads(schema), (dict, bool)):
            raise UsageError("the JSON schema is no object")
        from llama_cpp.llama_grammar import json_schema_to_gbnf

        return str(json_schema_to_gbnf(schema))
    except UsageError:
        raise
    except RecursionError as error:
        raise UsageError("the JSON schema is nested too deep") from error
    except Exception as error:  # it raises whatever happens to it on a schema that it does not know
        raise UsageError(
            f"the JSON schema cannot be used: {printable(error, 300)}",
            hint="It may use words that have no grammar, or not be JSON.",
        ) from error


def grammar_from_files(grammar: Path | None, schema: Path | None) -> str | None:
    """What `--grammar` or `--json-schema` asks for. Raises UsageError."""
    if grammar is not None and schema is not None:
        raise UsageError("--grammar and --json-schema exclude each other")
    if schema is not None:
        return grammar_of_schema(_read(schema, "--json-schema"))
    return None if grammar is None else _read(grammar, "--grammar")


def _read(path: Path, option: str) -> str:
    try:
        if path.stat().st_size > MAX_SIZE:
            raise UsageError(f"{option}: {path} is larger than {MAX_SIZE} bytes")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{option}: cannot read {path}: {error.strerror}", path=path) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{option}: {path} is no UTF-8 text", path=path) from error
