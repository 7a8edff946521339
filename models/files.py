"""Small files of our own, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from models.errors import OutputError
from models.text import printable


def write_json(path: Path, value: object) -> None:
    """Put `value` in place of what `path` held; another process may read it at any moment. For its owner only.

    Raises OutputError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(value, file, indent=1)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(
            f"cannot write {printable(path)}: {error.strerror or error}",
            hint="HANDMILL_HOME names another folder.",
            path=path,
        ) from error
