"""Who may import whom, read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "convert", "runner")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

LLAMA_CPP = ("runner/engine/", "runner/devices.py", "models/native.py", "convert/quantize.py")
HUGGINGFACE_HUB = ("models/hub.py",)
TERMINAL = ("runner/chat/", "runner/cli/")


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield node.module or ""


def roots(path: Path, top_level_only: bool = False) -> set[str]:
    return {name.partition(".")[0] for name in imports(path, top_level_only)}


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=place)
def test_one_direction(path: Path) -> None:
    where, used = place(path), roots(path)
    if where.startswith("models/"):
        assert not used & {"convert", "runner"}
    if where.startswith("convert/"):
        assert "runner" not in used
    if where.startswith("runner/"):
        assert "convert" not in used or where.startswith("runner/cli/")
    if where.startswith("runner/cli/"):
        assert "convert" not in roots(path, top_level_only=True)
    for package, allowed in (
        ("llama_cpp", LLAMA_CPP),
        ("huggingface_hub", HUGGINGFACE_HUB),
        ("prompt_toolkit", TERMINAL),
    ):
        assert package not in used or where.startswith(allowed), f"{where} imports {package}"
    assert not used & {"torch", "transformers"}, "oracles of the tests, nothing more"
    if not where.startswith("runner/chat/"):
        assert not any(name.startswith("runner.chat.app") for name in imports(path, top_level_only=True))


def test_the_engine_is_known_by_its_protocol_alone() -> None:
    for path in SOURCES:
        if place(path).startswith(("runner/chat/", "runner/session.py")):
            engine = {name for name in imports(path) if name.startswith("runner.engine")}
            assert engine <= {"runner.engine.protocol"}, place(path)


def test_commands_import_what_is_heavy_inside_run() -> None:
    light = {"argparse", "collections", "contextlib", "dataclasses", "datetime", "functools", "importlib", "json"}
    light |= {"math", "models", "os", "pathlib", "pkgutil", "re", "runner", "shutil", "signal", "sys", "threading"}
    light |= {"time", "types", "typing", "__future__"}
    for path in sorted((ROOT / "runner" / "cli").glob("*.py")):
        assert roots(path, top_level_only=True) <= light, place(path)
