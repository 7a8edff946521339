"""`config.toml` in handmill's folder: defaults for the options that commands share.

    context = 8192
    kv-type = "q8_0"
    worker = ["192.168.1.20:50052"]

A key is the long name of an option, and what the command line says counts more; what may be repeated is added to.
"""

from __future__ import annotations

import argparse

from models.errors import UsageError
from models.library import home
from models.text import printable


def apply(parser: argparse.ArgumentParser, *known: argparse.ArgumentParser) -> None:
    """Set the defaults of a command's options. Raises UsageError for what is none of its or of those `known`."""
    path = home() / "config.toml"
    if not path.exists():
        return
    import tomllib

    try:
        with path.open("rb") as file:
            settings = tomllib.load(file)
    except (OSError, ValueError) as error:  # what is no TOML or no UTF-8 is a ValueError
        raise UsageError(f"{printable(path)} cannot be read: {printable(error)}") from error
    for key, value in settings.items():
        option = _option(parser, key)
        if option is not None:
            parser.set_defaults(**{option.dest: _value(path, key, option, value)})
        elif not any(_option(other, key) for other in known):
            raise UsageError(
                f"{printable(path)}: there is no option {printable(key, 80)!r}",
                hint="A key is the long name of an option, such as context or kv-type; see `handmill run --help`.",
            )


def _option(parser: argparse.ArgumentParser, key: str) -> argparse.Action | None:
    found: argparse.Action | None = parser._option_string_actions.get(f"--{key}")
    return None if found is None or found.dest == "help" else found


def _value(path: object, key: str, option: argparse.Action, value: object) -> object:
    def fail(why: str) -> UsageError:
        return UsageError(f"{printable(path)}: {printable(key, 80)}: {why}")

    if option.nargs == 0:
        if not isinstance(value, bool):
            raise fail("takes true or false")
        return value
    repeated = isinstance(option, argparse._AppendAction)
    values = value if repeated and isinstance(value, list) else [value]
    found = []
    for one in values:
        if isinstance(one, bool) or not isinstance(one, (str, int, float)):
            raise fail("takes text or a number")
        try:
            found.append(option.type(str(one)) if callable(option.type) else str(one))
        except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
            raise fail(printable(error, 200)) from error
        if option.choices is not None and found[-1] not in option.choices:
            raise fail(f"takes one of {', '.join(map(str, option.choices))}")
    return found if repeated else found[0]
