"""The local library: a folder of GGUF files, and one small file of what cannot be seen in them.

    HANDMILL_HOME (or the platform's data folder)/
        models/*.gguf       the models; the name of one is its file's name without the ending
        checkpoints/        what was fetched from the hub to be converted
        state.json          the model used last, and what each converted model came from

The folder is the truth: a file put there is in the library, a file deleted is out of it. A name is looked up among
the files that are there and never joined to a path, so that no name reaches outside the folder.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import LibraryError, OutputError
from models.files import write_json
from models.gguf_parts import split_name
from models.text import printable

SUFFIX = ".gguf"
_WINDOWS_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)(\.|$)", re.IGNORECASE)
_FORBIDDEN = frozenset('<>:"/\\|?*')


@dataclass(frozen=True)
class LibraryModel:
    """One model. `size` in bytes, over all `parts` of a split one that are there; `path` is what to load."""

    name: str
    path: Path
    parts: tuple[Path, ...]
    size: int
    modified: float
    missing: int
    """How many parts are not there."""


def home() -> Path:
    """The folder of everything that handmill keeps. It need not exist yet."""
    if folder := os.environ.get("HANDMILL_HOME"):
        return Path(folder).expanduser()
    import platformdirs

    return platformdirs.user_data_path("handmill", appauthor=False)


def models_folder() -> Path:
    return home() / "models"


def checkpoints_folder() -> Path:
    return home() / "checkpoints"


def list_models() -> list[LibraryModel]:
    """Every model in the library, by name. An empty or missing folder gives none."""
    groups: dict[tuple[str, int], list[Path]] = {}
    with suppress(OSError):
        for path in sorted(models_folder().iterdir()):
            if path.suffix.lower() == SUFFIX and not path.name.startswith(".") and path.is_file():
                base, _, count = split_name(path.stem) or (path.stem, 0, 0)
                groups.setdefault((base, count), []).append(path)
    bases = Counter(base for base, _ in groups)
    models = []
    for (base, count), parts in groups.items():
        # a whole file beside parts of the same name, or sets of several counts, are models of their own
        name = base if bases[base] == 1 or not count else parts[0].stem
        stats = [part.stat() for part in parts]
        size, modified = sum(s.st_size for s in stats), max(s.st_mtime for s in stats)
        missing = max(count - len(parts), 0)
        models.append(LibraryModel(name, parts[0], tuple(parts), size, modified, missing))
    return sorted(models, key=lambda model: model.name.casefold())


def find_model(name: str) -> LibraryModel:
    """The model called `name`: its whole name, `name:TYPE`, or the beginning of one name only; case aside.

    Raises LibraryError with the names that come close.
    """
    models = list_models()
    wanted = name.casefold().removesuffix(SUFFIX)
    base, _, kind = wanted.partition(":")
    typed = {f"{base}-{kind}", f"{base}.{kind}"} if kind else set()
    exact = [m for m in models if m.name == name] or [m for m in models if m.name.casefold() == wanted]
    found = exact or [m for m in models if m.name.casefold() in typed]
    found = found or [m for m in models if wanted and m.name.casefold().startswith(wanted)]
    if len(found) == 1:
        return found[0]
    names = [model.name for model in found or models]
    if found:
        message, close = f"'{printable(name)}' is the beginning of {len(found)} models", names
    else:
        message = f"the library has no model '{printable(name)}'"
        folded = {n.casefold(): n for n in names}
        close = [folded[match] for match in difflib.get_close_matches(wanted, folded, 3, 0.5)]
        close += [n for n in names if wanted and wanted in n.casefold() and n not in close]
    shown = ", ".join(printable(n) for n in close[:8])
    hint = f"There is: {shown}." if shown else "`handmill list` shows what there is."
    raise LibraryError(message, hint=hint, name=name, close=tuple(close))


def remove_model(model: LibraryModel) -> None:
    """Delete a model's file or files, and forget it. Raises OutputError."""
    resolved = str(model.path.resolve())
    for part in model.parts:
        try:
            part.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"cannot remove {printable(part)}: {error.strerror or error}", path=part) from error
    state = _read_state()
    if state.get("last_used") == resolved:
        del state["last_used"]
    state["origins"].pop(model.path.name, None)
    _write_state(state)


def find_checkpoint(text: str) -> Path | None:
    """The folder of the checkpoint `owner/name`, if it was fetched."""
    wanted = text.casefold().replace("/", "--", 1)
    with suppress(OSError):
        for folder in checkpoints_folder().iterdir():
            if "/" in text and folder.name.casefold() == wanted and folder.is_dir():
                return folder
    return None


def remove_checkpoint(folder: Path) -> int:
    """Delete a fetched checkpoint; the bytes that were freed. Raises OutputError."""
    freed = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise OutputError(f"cannot remove {printable(folder)}: {error.strerror or error}", path=folder) from error
    return freed


def destination(name: str, file_type: str) -> Path:
    """Where a new model goes: `destination("Qwen2-0.5B", "Q4_K_M")` is `models/Qwen2-0.5B-Q4_K_M.gguf`.

    `name` may be any folder's name: what cannot stand in a file's name everywhere becomes a dash.
    """
    plain = re.sub(r"[^\w.+=,()@ -]+", "-", name).strip(" .-")[:60] or "model"
    return models_folder() / safe_filename(f"{plain}-{file_type}{SUFFIX}")


def safe_filename(name: str) -> str:
    """`name` itself, if it is a plain file name on Linux, macOS and Windows. Raises LibraryError otherwise."""
    bad = (
        not name.strip(". ")
        or name != name.strip(" ").rstrip(".")
        or name.startswith(".")
        or len(os.fsencode(name)) > 200
        or any(char in _FORBIDDEN or not char.isprintable() for char in name)
        or _WINDOWS_DEVICES.match(name) is not None
    )
    if bad:
        raise LibraryError(
            f"'{printable(name)}' cannot be a file's name",
            hint="Use letters, digits, dots, dashes and underscores.",
            name=name,
        )
    return name


def remember_used(path: Path) -> None:
    """Let `path` be what `handmill chat` opens when no model is named. A library that cannot be written is let be."""
    resolved = str(path.resolve())
    with suppress(OutputError):
        state = _read_state()
        if state.get("last_used") != resolved:
            _write_state(state | {"last_used": resolved})


def last_used() -> Path | None:
    """The model used last, if its file is still there."""
    path = _read_state().get("last_used")
    return Path(path) if isinstance(path, str) and Path(path).is_file() else None


def remember_origin(path: Path, source: str, stamp: str = "") -> None:
    """Note that the library's file `path` was made from `source`, in the state that `stamp` describes."""
    state = _read_state()
    state["origins"][path.name] = {"source": source, "stamp": stamp}
    _write_state(state)


def origin(path: Path) -> str | None:
    """What the library's file `path` was made from, if that was noted."""
    note = _read_state()["origins"].get(path.name)
    return note.get("source") if isinstance(note, dict) else None


def find_made_from(source: str, stamp: str = "") -> Path | None:
    """The library's file that was made from `source` in this very state, if there still is one."""
    for name, note in _read_state()["origins"].items():
        path = models_folder() / Path(name).name
        if note == {"source": source, "stamp": stamp} and path.is_file():
            return path
    return None


def remember_alias(text: str, path: Path) -> None:
    """Note that `text`, a hub reference, led to the library's file `path`, so that it does so without a network."""
    state = _read_state()
    state["aliases"][text.casefold()] = path.name
    _write_state(state)


def find_alias(text: str) -> Path | None:
    """The library's file that `text` led to, if it is still there."""
    name = _read_state()["aliases"].get(text.casefold())
    path = models_folder() / Path(name).name if isinstance(name, str) else None
    return path if path is not None and path.is_file() else None


def _read_state() -> dict[str, Any]:
    """A state that is missing or damaged is an empty one: it holds conveniences, never the models."""
    try:
        state = json.loads((home() / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        state = {}
    state = state if isinstance(state, dict) else {}
    return state | {key: state[key] if isinstance(state.get(key), dict) else {} for key in ("origins", "aliases")}


def _write_state(state: dict[str, Any]) -> None:
    write_json(home() / "state.json", state)
