"""The models in the library: name, file type, size, and which was used last.

--json prints one object a line: name, path, architecture, file_type, bytes, last_used. A file that cannot be read,
or lacks parts, has an error in place of its type.
"""

from __future__ import annotations

import argparse
import sys
import time

from models import library
from models.errors import ModelFileError
from models.gguf_file import peek_gguf
from models.text import human_bytes, printable
from runner.chat.render import json_line

HELP = "the models in the library"
ORDER = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(args: argparse.Namespace) -> int:
    models = library.list_models()
    used = library.last_used()
    width = max((len(printable(model.name)) for model in models), default=0)
    for model in models:
        facts: dict[str, object] = {"name": model.name, "path": str(model.path)}
        try:
            if model.missing:
                raise ModelFileError(f"{model.missing} of its parts are missing", path=model.path)
            peeked = peek_gguf(model.path)
            kind = peeked.file_type
            facts |= {"architecture": peeked.architecture, "file_type": kind}
        except ModelFileError as error:
            kind = "damaged"
            facts |= {"error": str(error)}
        is_last = used is not None and used == model.path.resolve()
        facts |= {"bytes": model.size, "last_used": is_last}
        if args.json:
            print(json_line(facts))
        else:
            day = time.strftime("%Y-%m-%d", time.localtime(model.modified))
            row = f"{printable(model.name):<{width}}  {kind:<10} {human_bytes(model.size):>8}  {day}"
            print(f"{row}  used last" if is_last else row)
    if not models and not args.json:
        print(f"No models yet in {printable(library.models_folder(), 1000)}.", file=sys.stderr)
        print("  `handmill pull starter`, or `handmill convert DIRECTORY`.", file=sys.stderr)
    return 0
