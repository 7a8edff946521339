"""Remove a model from the library, or a checkpoint that was fetched to be converted (owner/name).

A name is a library name only: a file elsewhere is not removed.
"""

from __future__ import annotations

import argparse

from models import library
from models.text import human_bytes, printable

HELP = "remove a model from the library"
ORDER = 70


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a name that `handmill list` shows, or owner/name")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")


def run(args: argparse.Namespace) -> int:
    folder = library.find_checkpoint(args.model)
    if folder is not None:
        freed = library.remove_checkpoint(folder)
        what = f"the checkpoint {args.model}"
    else:
        model = library.find_model(args.model)
        library.remove_model(model)
        freed, what = model.size, model.name
    if not args.quiet:
        print(f"Removed {printable(what)}, {human_bytes(freed)}.")
    return 0
