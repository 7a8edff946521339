"""Fetch a model from the hub into the library: owner/name, owner/name:TYPE, or `starter`.

Of a repository of GGUF files, the one of that type (default Q4_K_M); of any other, the files that a conversion needs.
Stopped, it goes on where it was when it is run again. Prints the path of what came; --json an object with path, kind
(gguf or checkpoint) and bytes.
"""

from __future__ import annotations

import argparse
import json

from models.errors import UsageError
from models.text import printable

HELP = "fetch a model from the hub into the library"
ORDER = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ref", metavar="REF", help="owner/name[:TYPE], or starter")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    from runner.cli.resolve import STARTER, fetch_progress

    if args.ref == STARTER:
        from models.starter import fetch_starter

        path = fetch_starter()
    else:
        from models.hub import fetch, parse_ref

        ref = parse_ref(args.ref)
        if ref is None:
            raise UsageError(
                f"{printable(args.ref)!r} is no hub reference", hint="Write owner/name or owner/name:TYPE."
            )
        with fetch_progress(args.quiet) as progress:
            path = fetch(ref, progress)
    kind = "checkpoint" if path.is_dir() else "gguf"
    size = sum(part.stat().st_size for part in path.iterdir()) if path.is_dir() else path.stat().st_size
    print(json.dumps({"path": str(path), "kind": kind, "bytes": size}) if args.json else printable(path, 4096))
    return 0
