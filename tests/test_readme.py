"""What the README tells people to type exists: commands, options, make targets, files."""

from __future__ import annotations

import re
import shlex

import pytest

from runner.cli.main import build_parser
from scripts.environment import ROOT
from scripts.families_table import BEGIN, END, table

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(?:sh|powershell)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()] + re.findall(r"`(handmill [^`]+)`", README)
COMMANDS = [line for line in LINES if line.startswith("handmill ") and "--help" not in line]


def test_the_commands_were_found() -> None:
    assert {line.split()[1] for line in COMMANDS} >= {"chat", "run", "convert", "pull", "list", "show", "rm"}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_accepted(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    if "<" in words:
        words = words[: words.index("<")]
    build_parser().parse_args(words)  # exits, and so fails the test, when it does not know a word


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`|\| )make ([a-z-]+)", README, re.MULTILINE))
    assert named >= {"chat", "test", "test-parity", "test-gpu", "bench"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_table_of_families_is_what_the_families_say() -> None:
    """If it is not: python -m scripts.families_table."""
    assert f"{BEGIN}\n\n{table()}\n\n{END}" in README
