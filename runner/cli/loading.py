"""From the command line's arguments to a loaded engine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from models import library
from models.text import printable
from runner.cli.options import load_options
from runner.cli.progress import ProgressLine
from runner.cli.resolve import resolve_model

if TYPE_CHECKING:
    from runner.engine.protocol import LoadedEngine


@contextmanager
def loaded_engine(args: argparse.Namespace) -> Iterator[LoadedEngine]:
    """Resolve MODEL, load it with a line of progress, say on stderr what is to be said of it; closed at the end.

    Raises HandmillError.
    """
    path = resolve_model(args.model, quiet=args.quiet)
    from runner.engine.start import load

    with ProgressLine(args.quiet or args.verbose) as line:
        engine = load(path, load_options(args), lambda share: line.show(f"loading {path.stem}", share, 1.0))
    try:
        library.remember_used(path)
        for note in engine.info.notes if not args.quiet else ():
            print(f"note: {printable(note, 1000)}", file=sys.stderr)
        yield engine
    finally:
        engine.close()
