"""The virtual environment: what it should hold, what it holds, and the steps from one to the other.

A stamp inside the environment remembers what was installed. When that is still what is wanted, nothing is started:
no pip, no import, no compiler.

Runs on the system's Python before anything is installed, so it needs the standard library only.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.console import SetupError, say
from scripts.llama_wheel import PACKAGE, Build, missing_backends, provide_wheel, wanted_build

ROOT = Path(__file__).resolve().parent.parent
Stamp = dict[str, str]

_LIST_LIBRARIES = """
import pathlib, llama_cpp
print(*(p.name for p in (pathlib.Path(llama_cpp.__file__).parent / "lib").iterdir()))
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="install.py", description="Make the virtual environment.")
    parser.add_argument("--venv", default=".venv")
    parser.add_argument("--extra", default="", help="an optional-dependencies group of pyproject.toml")
    parser.add_argument("requirements", nargs="*")
    args = parser.parse_args()
    try:
        ensure(ROOT / args.venv, args.extra, args.requirements)
    except SetupError as error:
        say(f"handmill: {error}")
        return 1
    except OSError as error:
        say(f"handmill: {error}")
        return 1
    except KeyboardInterrupt:
        say("handmill: interrupted; the next run does what is left")
        return 130
    return 0


def ensure(venv: Path, extra: str, requirements: list[str]) -> None:
    """Bring the environment to what is wanted. Safe to interrupt: a step is stamped when it is done."""
    build = wanted_build(llama_version(), os.environ)
    wanted = wanted_stamp(venv, build, extra, requirements)
    if outdated(venv, wanted) == []:
        return
    with _alone(venv):
        steps = outdated(venv, wanted)
        python = venv / "bin" / "python"
        if "python" in steps:
            _make_venv(venv)
        if "wheel" in steps:
            _install_wheel(build, python)
            _stamp(venv, wanted, "python", "wheel")
        if steps:
            what = f".[{extra}]" if extra else "."
            say(f"Installing handmill{f' and what its {extra}s need' if extra else ''} into {venv.name} ...")
            _pip(python, "install", "--editable", what, *requirements)
            _stamp(venv, wanted, *wanted)


def wanted_stamp(venv: Path, build: Build, extra: str, requirements: list[str]) -> Stamp:
    """What the environment should hold, by part. An extra brings all that the plain project needs, too."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    names = {"project", f"project {extra} {' '.join(requirements)}".strip()}
    return {
        # An environment cannot be moved: its scripts hold its path.
        "python": f"{sys.version} {sys.base_prefix} {venv}",
        "wheel": build.key,
    } | {name: hashlib.sha256((name + project).encode()).hexdigest() for name in sorted(names)}


def outdated(venv: Path, wanted: Stamp) -> list[str]:
    """The parts that are not as wanted. All of them when the interpreter itself is another."""
    held = _held(venv)
    if held.get("python") != wanted["python"] or not (venv / "bin" / "python").exists():
        return list(wanted)
    return [part for part in wanted if held.get(part) != wanted[part]]


def llama_version() -> str:
    """The release of llama-cpp-python that pyproject.toml pins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = [line for line in project["dependencies"] if line.startswith(f"{PACKAGE}==")]
    return str(pins[0].partition("==")[2])


def cache_folder() -> Path:
    """Outside the checkout: a second clone need not compile again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "handmill"


def _make_venv(venv: Path) -> None:
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise SetupError(
            f"{sys.executable} has no venv module. On Debian or Ubuntu: sudo apt install python{version}-venv"
        )
    shutil.rmtree(venv, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "venv", str(venv)], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        raise SetupError(f"cannot make {venv}: {(done.stdout + done.stderr).strip()}")


def _install_wheel(build: Build, python: Path) -> None:
    """Install the wheel and see that it loads. One that does not is thrown away and built again, once."""
    wheels = cache_folder() / "wheels"
    for last in (False, True):
        wheel = provide_wheel(build, python, wheels)
        # By force: for pip a wheel of the same version is the same wheel.
        _pip(python, "install", "--force-reinstall", "--no-deps", str(wheel))
        _pip(python, "install", f"{PACKAGE}=={build.version}")  # its dependencies, to be able to load it
        problem = _installed_problem(python, build)
        if not problem:
            return
        if last:
            raise SetupError(f"llama.cpp is installed, but {problem}")
        say(f"The wheel does not work here ({problem}); it is built again.")
        wheel.unlink()


def _installed_problem(python: Path, build: Build) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "LLAMA_CPP_LIB_PATH"}
    done = subprocess.run(
        [str(python), "-I", "-c", _LIST_LIBRARIES],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it cannot be imported"])[-1]
    return missing_backends(done.stdout.split(), build.backends)


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if not line.startswith("WARNING: Location")]
        raise SetupError("\n  ".join([f"pip failed: {' '.join(arguments)}", *said[-15:]]))


def _held(venv: Path) -> Stamp:
    try:
        held = json.loads((venv / "handmill.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _stamp(venv: Path, wanted: Stamp, *parts: str) -> None:
    held = _held(venv) | {part: wanted[part] for part in parts}
    fresh = venv / "handmill.json.new"
    fresh.write_text(json.dumps(held, indent=1), encoding="utf-8")
    fresh.replace(venv / "handmill.json")


@contextmanager
def _alone(venv: Path) -> Iterator[None]:
    """`make chat` in one terminal and `make test` in another must not install over each other."""
    lock = ROOT / "build" / f"{venv.name}.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Another make is at work on {venv.name}; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
