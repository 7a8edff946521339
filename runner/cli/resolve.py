"""What MODEL and SOURCE on the command line stand for.

MODEL is a GGUF path, a library name, a hub reference `owner/name[:TYPE]`, a checkpoint directory (which is converted
once and remembered), or `starter`. No MODEL: the last one used, else the starter model. What is on this machine comes
before what would have to be fetched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from models import library
from models.errors import HubError, ModelFileError
from models.gguf_parts import check_model_file
from models.text import human_bytes, printable
from runner.cli.progress import ProgressLine

if TYPE_CHECKING:
    from models.hub import FetchProgress, HubRef

STARTER = "starter"
DEFAULT_FILE_TYPE = "Q4_K_M"


def resolve_model(text: str | None, quiet: bool = False) -> Path:
    """The GGUF file that `text` stands for; it may be fetched or converted first. Raises HandmillError."""
    path = _model_here(text)
    if path is None:
        assert text is not None
        path = _from_checkpoint(Path(text), None, quiet) if Path(text).is_dir() else _from_hub(text, quiet)
    return path


def resolve_local_model(text: str | None) -> Path:
    """Like `resolve_model`, of what is here already: nothing is fetched or converted. Raises HandmillError."""
    path = _model_here(text)
    if path is None:
        assert text is not None
        if Path(text).is_dir() or Path(text).exists():
            check_model_file(Path(text))
        path = library.find_model(text).path
    return path


@contextmanager
def resolved_header(text: str | None) -> Iterator[Path]:
    """A GGUF file to plan with: of what is not here, or not converted, one with a hole in place of the tensors.

    That one goes when the block ends. A checkpoint is planned in the type that a reference names, else the default.
    Raises HandmillError.
    """
    import tempfile

    path = _model_here(text)
    if path is not None:
        yield resolve_local_model(text)
        return
    assert text is not None
    with tempfile.TemporaryDirectory(prefix="handmill-") as name:
        folder, ref = Path(name), _hub_ref(text)
        if ref is not None:
            from models.hub import fetch_headers

            fetched = folder / ref.name  # a checkpoint without a name of its own is called as its folder
            fetched.mkdir()
            with _said_where_else(text):
                path = fetch_headers(ref, fetched)
            yield _hollow_model(path, ref.file_type, folder, ref.name) if path.is_dir() else path
            return
        checkpoint = Path(text)
        made = library.find_made_from(_source_key(checkpoint, DEFAULT_FILE_TYPE), _stamp(checkpoint))
        yield made or _hollow_model(checkpoint, None, folder, checkpoint.resolve().name)


def _hollow_model(checkpoint: Path, file_type: str | None, folder: Path, name: str) -> Path:
    """What a checkpoint would be converted to, without its tensors."""
    from convert.converter import plan_conversion
    from convert.file_types import file_type as kind_of
    from convert.placement import write_headers

    kind = kind_of(file_type or DEFAULT_FILE_TYPE)
    path = folder / library.destination(name, kind.name).name
    path.touch()
    write_headers(plan_conversion(checkpoint, kind), [path])
    return path


def checkpoint_source(text: str, quiet: bool = False) -> tuple[Path, str, str | None]:
    """The checkpoint directory of SOURCE, a name for what comes of it, and the file type that a reference names.

    A hub reference is fetched first.
    """
    ref = _hub_ref(text)
    if ref is None:
        return Path(text), Path(text).resolve().name, None
    from models.hub import fetch_checkpoint

    with _said_where_else(text), fetch_progress(quiet) as progress:
        return fetch_checkpoint(ref, progress), ref.name, ref.file_type


@contextmanager
def fetch_progress(quiet: bool = False) -> Iterator[FetchProgress]:
    """A line of progress for a fetch from the hub."""
    with ProgressLine(quiet) as line:
        yield lambda done, total, name: line.show("fetching", done, total, human_bytes)


def _model_here(text: str | None) -> Path | None:
    """The file, if it is on this machine; None for a directory or a hub reference. Raises LibraryError."""
    from models.starter import starter_path

    if text is None:
        return library.last_used() or starter_path()
    path = Path(text)
    if _exists(path):
        return None if path.is_dir() else path
    if alias := library.find_alias(text):
        return alias
    if text == STARTER:
        return starter_path()
    if _hub_ref(text) is not None:
        return None
    if "/" in text or "\\" in text:
        raise ModelFileError(
            f"{printable(text)} does not exist", hint="`handmill list` shows the models in the library.", path=path
        )
    return library.find_model(text).path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _hub_ref(text: str) -> HubRef | None:
    """The reference that `text` is, unless something of that name lies here."""
    from models.hub_files import parse_ref

    return None if _exists(Path(text)) else parse_ref(text)


def _from_hub(text: str, quiet: bool) -> Path:
    from models.hub import fetch

    ref = _hub_ref(text)
    assert ref is not None
    with _said_where_else(text), fetch_progress(quiet) as progress:
        fetched = fetch(ref, progress)
    if fetched.is_file():
        return fetched
    path = _from_checkpoint(fetched, ref.file_type, quiet, name=ref.name)
    library.remember_alias(text, path)
    return path


@contextmanager
def _said_where_else(text: str) -> Iterator[None]:
    """`models/qwen` may be a mistyped path as well as a reference: say that both were tried."""
    try:
        yield
    except HubError as error:
        raise HubError(
            f"{error} (and there is no file or directory {printable(text)})", hint=error.hint, **error.facts
        ) from error


def _from_checkpoint(folder: Path, file_type: str | None, quiet: bool, name: str = "") -> Path:
    """Convert a checkpoint directory into the library, or find what was made of it in this very state before."""
    from convert.file_types import file_type as kind_of

    kind = kind_of(file_type or DEFAULT_FILE_TYPE)
    source = _source_key(folder, kind.name)
    if made := library.find_made_from(source, _stamp(folder)):
        return made
    from convert.converter import convert_checkpoint

    output = library.destination(name or folder.resolve().name, kind.name)
    number = 2
    while output.exists() and library.origin(output) != source:
        output = library.destination(f"{name or folder.resolve().name}-{number}", kind.name)
        number += 1
    output.parent.mkdir(parents=True, exist_ok=True)
    if not quiet:
        print(f"Converting {printable(folder)} to {kind.name}, once.", file=sys.stderr)
    with ProgressLine(quiet) as line:
        report = convert_checkpoint(
            folder,
            output,
            kind,
            force=True,
            progress=lambda stage, done, total: line.show(stage, done, total, human_bytes),
        )
    for warning in report.warnings if not quiet else ():
        print(f"note: {printable(warning, 1000)}", file=sys.stderr)
    remember_conversion(folder, kind.name, output)
    return output


def remember_conversion(folder: Path, file_type: str, output: Path) -> None:
    """Note that the checkpoint `folder` became the library's file `output`, so that it is not converted again."""
    if output.parent.resolve() == library.models_folder().resolve():
        library.remember_origin(output, _source_key(folder, file_type), _stamp(folder))


def _source_key(folder: Path, file_type: str) -> str:
    return f"{folder.resolve()}:{file_type}"


def _stamp(folder: Path) -> str:
    """Changes when a file of the checkpoint does: newest change, number and bytes of its files."""
    stats = [
        path.stat()
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix in (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
        and path.name[0] != "."
    ]
    newest = max((stat.st_mtime_ns for stat in stats), default=0)
    return f"{newest} {len(stats)} {sum(stat.st_size for stat in stats)}"
