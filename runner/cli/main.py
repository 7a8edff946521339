"""The command line. Here, and only here, an error becomes a message, a hint and an exit code.

Every module of this package that has `add_arguments` is a command: its name is the module's, its line in the help its
`HELP`, its place there its `ORDER`. So a command is added by adding a file. Command modules import what is heavy
inside `run`, since all of them are imported for the help; where a command is named, only its own is.

Exit codes: 0 done, 1 a named error, 2 usage, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, ModuleType

from models.errors import HandmillError
from models.text import printable
from runner.cli.options import with_defaults


class Terminated(BaseException):
    """The process was asked to end. Not an Exception, so that only clean-up runs on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def console() -> int:
    """The entry point of the console script."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # Replies are in every script there is; a console with a narrower encoding must not end one.
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    return main(sys.argv[1:])


def main(argv: Sequence[str]) -> int:
    """Run one command line; the exit code. Raises nothing, but for HANDMILL_DEBUG."""
    try:
        try:
            args = parse(argv)
        except SystemExit as stop:  # argparse has said why, or has printed the help
            return stop.code if isinstance(stop.code, int) else 2
        with _signals_end_cleanly():
            code: int = args.run(args)
            sys.stdout.flush()
            return code
    except HandmillError as error:
        if os.environ.get("HANDMILL_DEBUG"):
            raise
        # names of files, out of a checkpoint's folder or from the command line, may hold anything
        _complain(printable(error, 4000), printable(error.hint, 4000))
        return error.exit_code
    except KeyboardInterrupt:
        _complain("stopped by Ctrl-C")
        return 130
    except Terminated as stop:
        _complain(f"stopped by {stop}")
        return stop.exit_code
    except BrokenPipeError:
        # The reader has seen enough. What Python still wants to flush at exit must go nowhere, silently.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("HANDMILL_DEBUG"):
            raise
        _complain(
            f"unexpected {type(error).__name__}: {printable(error)}",
            "This is a fault of handmill. HANDMILL_DEBUG=1 shows where it happened.",
        )
        return 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments. Raises SystemExit, as argparse does, and UsageError for a bad `config.toml`."""
    parser = build_parser(argv[0] if argv else None, configured=not {"-h", "--help"} & set(argv))
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what could stand at the cursor
        import argcomplete

        argcomplete.autocomplete(parser)
    args, rest = parser.parse_known_args(argv)
    if rest:
        # argparse gives up on `run MODEL --seed 1 some words`: it has closed the list of words at the option.
        if not hasattr(args, "prompt") or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {printable(' '.join(rest))}")
        args.prompt += rest
    return args


def build_parser(command: str | None = None, *, configured: bool = False) -> argparse.ArgumentParser:
    """A parser of `command` alone, if there is such a one, else of all; `configured` with the person's defaults."""
    parser = argparse.ArgumentParser(
        prog="handmill",
        description="Quantize Hugging Face checkpoints and chat with them, offline, on your own hardware.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in command_modules(command) or command_modules():
        sub = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(sub)
        if configured and name == command:
            with_defaults(sub)
        sub.set_defaults(run=module.run)
    return parser


def command_modules(only: str | None = None) -> list[tuple[str, ModuleType]]:
    """Every command and its module, or the one of that name, in the order in which the help lists them."""
    import runner.cli

    found = []
    for info in pkgutil.iter_modules(runner.cli.__path__):
        if info.name != "main" and only in (None, info.name):
            module = importlib.import_module(f"runner.cli.{info.name}")
            if hasattr(module, "add_arguments"):
                found.append((info.name, module))
    return sorted(found, key=lambda item: (getattr(item[1], "ORDER", 1000), item[0]))


def _complain(message: str, hint: str = "") -> None:
    with suppress(OSError, ValueError):
        print(f"handmill: {message}", file=sys.stderr)
        if hint:
            print(f"  {hint}", file=sys.stderr)


@contextmanager
def _signals_end_cleanly() -> Iterator[None]:
    """Let SIGTERM and a closed terminal unwind the stack like Ctrl-C does, so that temporary files go."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    numbers = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    # A signal that was ignored stays so: nohup means it.
    before = {number: signal.signal(number, stop) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(console())
