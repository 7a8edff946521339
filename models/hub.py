"""Fetching from the Hugging Face hub. The only module that imports `huggingface_hub`.

One request lists a repository: names, sizes and hashes. What is needed of it is then fetched file by file into a
part file named by the content's hash, checked against that hash, and moved into place. The part files are our own,
since `huggingface_hub` throws a part away when its process ends: here a fetch that was stopped, by Ctrl-C as well
as by a lost network, goes on where it was the next time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from models import library
from models.errors import HandmillError, HubError, LibraryError, ModelFileError
from models.gguf_file import read_gguf
from models.hub_files import HubFile, HubRef, Listing, is_model, parse_ref, pick_checkpoint, pick_gguf
from models.text import human_bytes, printable

__all__ = ["FetchProgress", "HubRef", "fetch", "fetch_checkpoint", "fetch_headers", "parse_ref"]

FetchProgress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and the name of the file that is being fetched."""

_SLAB = 1 << 20
_FIRST_BYTES, _MOST_BYTES = 1 << 20, 1 << 26
"""Of a GGUF file: what is asked for at first, and what no header takes; the largest vocabularies take 2^24 bytes."""


def fetch(ref: HubRef, progress: FetchProgress | None = None) -> Path:
    """Fetch a model: the GGUF file of a repository that has any, else its checkpoint directory. Raises HubError."""
    listing = _list(ref)
    if any(is_model(file.name) for file in listing.files):
        return _fetch_gguf(listing, progress)
    return _fetch_checkpoint(listing, progress)


def fetch_checkpoint(ref: HubRef, progress: FetchProgress | None = None) -> Path:
    """The directory of a whole checkpoint; asked again, only what changed is fetched. Raises HubError.

    Where the hub cannot be reached, a checkpoint that was fetched whole before is good enough.
    """
    try:
        listing = _list(ref)
    except HubError as error:
        folder = _checkpoint_folder(ref)
        if error.facts.get("unreachable") and _read_marker(folder).get("complete"):
            return folder
        raise
    return _fetch_checkpoint(listing, progress)


def fetch_headers(ref: HubRef, folder: Path) -> Path:
    """Put into `folder` what `fetch` would bring, with a hole in place of each file's tensors.

    Enough to read it and to plan with it: a megabyte or some. The path of a GGUF file (its first part), or `folder`, a
    checkpoint of safetensors then. No hash tells whether the beginning of a file is as it was meant. Raises HubError,
    ModelFileError.
    """
    listing = _list(ref)
    with _translated(ref):
        if any(is_model(file.name) for file in listing.files):
            parts = [_fetch_header(listing, file, folder) for file in pick_gguf(listing)]
            return parts[0]
        for file in pick_checkpoint(listing):
            if file.name.endswith(".bin"):
                raise HubError(
                    f"{listing.ref.repo} has its weights as PyTorch files, which do not begin with what is in them",
                    hint=f"`handmill pull {listing.ref}` fetches it whole.",
                    repo=listing.ref.repo,
                )
            _write_beginning(listing, file, _beginning(listing, file), folder / file.name)
        return folder


def _beginning(listing: Listing, file: HubFile) -> int:
    """How many bytes are needed of a checkpoint's file: all, or the header of a shard, whose length comes first."""
    if not file.name.endswith(".safetensors") or file.size < 8:
        return file.size
    header = 8 + int.from_bytes(_first_bytes(listing, file, 8), "little")
    if header > min(file.size, _MOST_BYTES):
        raise HubError(f"{printable(file.name)} of {listing.ref.repo} is no safetensors file", repo=listing.ref.repo)
    return header


def _write_beginning(listing: Listing, file: HubFile, count: int, path: Path) -> None:
    with path.open("wb") as out:
        out.write(_first_bytes(listing, file, count))
        out.truncate(file.size)


def _fetch_header(listing: Listing, file: HubFile, folder: Path) -> Path:
    path = folder / library.safe_filename(file.name.rpartition("/")[2])
    wanted = min(_FIRST_BYTES, file.size)
    while True:
        _write_beginning(listing, file, wanted, path)
        try:
            header = read_gguf(path)
            # What follows the bytes that are here reads as zeros: a header that ends among them was not all here.
            if min((tensor.offset for tensor in header.tensors), default=0) <= wanted:
                return path
        except ModelFileError:
            if wanted in (file.size, _MOST_BYTES):
                raise
        wanted = min(4 * wanted, file.size, _MOST_BYTES)


def _first_bytes(listing: Listing, file: HubFile, count: int) -> bytes:
    from huggingface_hub import hf_hub_url

    # get_session is documented there, and only left out of the module's own list of what it exports.
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    if not count:
        return b""
    url = hf_hub_url(listing.ref.repo, file.name, revision=listing.commit, endpoint=_endpoint())
    headers = build_hf_headers(library_name="handmill") | {"Range": f"bytes=0-{count - 1}"}
    head = bytearray()
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as response:
        hf_raise_for_status(response)
        for chunk in response.iter_bytes(_SLAB):  # a server that knows no ranges sends all: it is left then
            head += chunk
            if len(head) >= count:
                break
    if len(head) < count:
        raise HubError(f"the hub sent {len(head)} of {count} bytes of {printable(file.name)}", repo=listing.ref.repo)
    return bytes(head[:count])


def _fetch_checkpoint(listing: Listing, progress: FetchProgress | None) -> Path:
    wanted = pick_checkpoint(listing)
    folder = _checkpoint_folder(listing.ref)
    held = _read_marker(folder).get("files")
    held = held if isinstance(held, dict) else {}
    todo = [f for f in wanted if held.get(f.name) != f.digest or _size(folder / f.name) != f.size]
    with _translated(listing.ref):
        for file in _fetch_files(listing, todo, progress, lambda file: folder / file.name):
            held[file.name] = file.digest
            _write_marker(folder, {"commit": listing.commit, "files": held, "complete": False})
        if stale := held.keys() - {file.name for file in wanted}:
            # An index that this commit has no more would win over its weights.
            _write_marker(folder, {"commit": listing.commit, "files": held, "complete": False})
            for name in stale:
                (folder / Path(name).name).unlink(missing_ok=True)
                del held[name]
        _write_marker(folder, {"commit": listing.commit, "files": held, "complete": True})
    return folder


def _fetch_gguf(listing: Listing, progress: FetchProgress | None) -> Path:
    """The GGUF file of the type asked for (default Q4_K_M), in the library; of a split one the first part."""
    files = pick_gguf(listing)
    folder = library.models_folder()
    targets: dict[str, Path] = {}
    for file in files:
        try:
            targets[file.name] = folder / library.safe_filename(file.name.rpartition("/")[2])
        except LibraryError as error:
            raise HubError(f"{listing.ref.repo} names a file that is not taken: {error}", hint=error.hint) from error
    todo = []
    for file in files:
        target, source = targets[file.name], f"{listing.ref.repo}/{file.name}"
        if target.exists() and library.origin(target) != source:
            raise HubError(
                f"the library has another {target.name} already",
                hint=f"Remove it first: `handmill rm {target.stem}`.",
                path=target,
            )
        if _size(target) != file.size or library.find_made_from(source, file.digest) != target:
            todo.append(file)
    with _translated(listing.ref):
        for file in _fetch_files(listing, todo, progress, lambda file: targets[file.name]):
            library.remember_origin(targets[file.name], f"{listing.ref.repo}/{file.name}", file.digest)
    first = targets[files[0].name]
    library.remember_alias(str(listing.ref), first)
    return first


def _list(ref: HubRef) -> Listing:
    """Names, sizes and hashes of a repository's files: one request."""
    with _translated(ref):
        from huggingface_hub import HfApi

        info = HfApi(endpoint=_endpoint()).model_info(ref.repo, files_metadata=True, timeout=30)
        files = []
        for entry in info.siblings or ():
            digest = (entry.lfs.sha256 if entry.lfs else entry.blob_id) or ""
            if entry.size is None or re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", digest) is None:
                raise HubError(f"the hub's listing of {ref.repo} gives no size or hash of a file", repo=ref.repo)
            files.append(HubFile(entry.rfilename, entry.size, digest))
        return Listing(ref, info.sha or "main", tuple(files))


def _fetch_files(
    listing: Listing,
    files: list[HubFile],
    progress: FetchProgress | None,
    target_of: Callable[[HubFile], Path],
) -> Iterator[HubFile]:
    """Fetch each file to its target, and yield it once it is there."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    parts, locks = library.home() / "partial", library.home() / ".locks"
    for folder in (parts, locks):
        folder.mkdir(parents=True, exist_ok=True)
    total = sum(file.size for file in files)
    held = sum(min(_size(parts / file.digest) or 0, file.size) for file in files)
    free = shutil.disk_usage(parts).free
    if total - held > free:
        raise HubError(
            f"{listing.ref} needs {human_bytes(total - held)}, {printable(parts)} has {human_bytes(free)} free",
            hint="Make room, or let HANDMILL_HOME name a folder on a larger disk.",
            needed=total - held,
            free=free,
        )
    before = 0
    for file in files:
        part, target = parts / file.digest, target_of(file)
        report = _Report(progress, before, total, file.name)
        # A second handmill waits, then finds the file whole. The lock's file stays: one who waits has it open.
        with WeakFileLock(locks / file.digest):
            if _size(target) == file.size and _digest(target, file) == file.digest:
                report.start(file.size)
            else:
                _download(listing, file, part, report)
                target.parent.mkdir(parents=True, exist_ok=True)
                part.replace(target)
        before += file.size
        yield file


def _download(listing: Listing, file: HubFile, part: Path, report: _Report) -> None:
    """Fetch what `part` lacks of a file. Raises HubError where the whole has another hash."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(listing.ref.repo, file.name, revision=listing.commit, endpoint=_endpoint())
    # The client holds back what has arrived until it has 10 MB: a slow line would seem to stand still, and lose them.
    constants.DOWNLOAD_CHUNK_SIZE = _SLAB
    with part.open("ab") as out:
        if out.tell() > file.size:
            out.truncate(0)
        report.start(out.tell())
        http_get(
            url,
            out,
            resume_size=out.tell(),
            headers=build_hf_headers(library_name="handmill"),
            expected_size=file.size,
            displayed_filename=file.name,
            tqdm_class=report.bar,  # type: ignore[arg-type]
        )
    if _digest(part, file) != file.digest:
        part.unlink()
        raise HubError(
            f"{printable(file.name)} of {listing.ref.repo} arrived damaged: its hash is wrong",
            hint="Run the same command again to fetch it anew.",
            repo=listing.ref.repo,
        )


class _Report:
    """Turns the client's progress bar into calls of a FetchProgress."""

    def __init__(self, progress: FetchProgress | None, before: int, total: int, name: str) -> None:
        self._progress, self._done, self._total, self._name = progress, before, total, name

    def start(self, held: int) -> None:
        self.update(held)

    def update(self, count: float | None = 1) -> None:
        self._done += int(count or 0)
        if self._progress is not None:
            self._progress(self._done, self._total, self._name)

    def bar(self, **_: Any) -> _Report:
        return self

    def __enter__(self) -> _Report:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def _digest(path: Path, file: HubFile) -> str:
    """The hash of what arrived, of the kind that the listing gave."""
    if len(file.digest) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as content:
        while slab := content.read(_SLAB):
            digest.update(slab)
    return digest.hexdigest()


@contextmanager
def _translated(ref: HubRef) -> Iterator[None]:
    """Turn whatever the client raises into a HubError of one line."""
    import logging

    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings would break the progress bar
    try:
        yield
    except HandmillError:
        raise
    except HfHubHTTPError as error:
        message, hint = _explain_status(ref, error)
        raise HubError(message, hint=hint, repo=ref.repo) from error
    except OfflineModeIsEnabled as error:
        raise HubError(
            f"{ref} is not here, and HF_HUB_OFFLINE forbids asking the hub",
            hint="Unset HF_HUB_OFFLINE.",
            repo=ref.repo,
            unreachable=True,
        ) from error
    except TransportError as error:
        host = (_endpoint() or "https://huggingface.co").partition("://")[2]
        raise HubError(
            f"{printable(host)} cannot be reached, or the connection broke: {_one_line(error)}",
            hint="Check the network and run the same command again; what has arrived is kept.",
            repo=ref.repo,
            unreachable=True,
        ) from error
    except HFValidationError as error:
        raise HubError(f"{ref.repo} is no repository's name: {_one_line(error)}", repo=ref.repo) from error
    except OSError as error:
        full = error.errno == errno.ENOSPC
        raise HubError(
            f"{ref} could not be fetched: {'the disk is full' if full else _one_line(error)}",
            hint="Make room and run the same command again." if full else "Run the same command again.",
            repo=ref.repo,
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # a proxy's page in place of JSON
        raise HubError(
            f"the hub's answer for {ref.repo} makes no sense: {_one_line(error)}",
            hint="A proxy or a login page may stand in between.",
            repo=ref.repo,
        ) from error


def _explain_status(ref: HubRef, error: Any) -> tuple[str, str]:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    status = error.response.status_code
    token = "set HF_TOKEN to a token of https://huggingface.co/settings/tokens"
    if isinstance(error, GatedRepoError):
        return f"{ref.repo} is gated", f"Accept its terms at https://huggingface.co/{ref.repo}, then {token}."
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return f"the hub has no {ref.repo}, or it is private", f"Check the spelling; if it is private, {token}."
    if status == 403:
        return f"the hub refuses {ref.repo} (403)", f"If it is private, {token}."
    if status == 429:
        return "the hub says: too many requests (429)", f"Wait a few minutes, or {token}."
    return f"the hub answered with an error ({status}) for {ref.repo}", "Try again later; what has arrived is kept."


def _one_line(error: BaseException) -> str:
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0])


def _endpoint() -> str | None:
    # Read at each call and not, as the client does, at its import.
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _checkpoint_folder(ref: HubRef) -> Path:
    try:
        return library.checkpoints_folder() / library.safe_filename(f"{ref.owner}--{ref.name}")
    except LibraryError as error:
        raise HubError(str(error), repo=ref.repo) from error


def _read_marker(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        marker = json.loads((folder / ".fetched.json").read_text(encoding="utf-8"))
        if isinstance(marker, dict):
            return marker
    return {}


def _write_marker(folder: Path, marker: dict[str, Any]) -> None:
    temporary = folder / f".fetched.json.{threading.get_native_id()}"
    temporary.write_text(json.dumps(marker), encoding="utf-8")
    temporary.replace(folder / ".fetched.json")


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
