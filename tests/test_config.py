"""`config.toml`: defaults that the command line overrules."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.errors import UsageError
from runner.cli import main as cli
from runner.cli.options import load_options


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HANDMILL_HOME", str(tmp_path))
    return tmp_path / "config.toml"


def test_it_sets_defaults_and_the_command_line_counts_more(config: Path) -> None:
    config.write_text(
        'context = 8192\nkv-type = "q8_0"\nworker = ["a:1", "b"]\nno-speculate = true\nvram = "6G"\n'
        'temperature = 0.5\nthink = "off"\ngpu-layers = 12\nstop = "END"\n'
    )
    args = cli.parse(["run", "m", "hello", "-c", "2048", "--worker", "c:3"])
    options = load_options(args)
    assert (options.context, options.kv_types) == (2048, ("q8_0", "q8_0"))
    assert options.workers == ("a:1", "b:50052", "c:3")
    assert (options.speculate, options.vram, options.gpu_layers) == (False, 6 << 30, 12)
    assert (args.temperature, args.think, args.stop) == (0.5, "off", ["END"])
    assert load_options(cli.parse(["run", "m"])).workers == ("a:1", "b:50052")
    assert load_options(cli.parse(["fit", "m"])).context == 8192  # it samples nothing, and takes what it knows


def test_without_it_nothing_changes(config: Path) -> None:
    assert load_options(cli.parse(["run", "m"])).context is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("context = [", "cannot be read"),
        ("ctx = 5", "no option 'ctx'"),
        ("help = true", "no option 'help'"),
        ("context = 0.5", "context: "),
        ('context = "many"', "context: "),
        ("context = true", "context: takes text or a number"),
        ("no-speculate = 1", "no-speculate: takes true or false"),
        ('worker = ["x:y"]', "worker: 'x:y' is no HOST:PORT"),
        ("worker = [{}]", "worker: takes text or a number"),
        ('think = "perhaps"', "think: takes one of on, off"),
        ("[context]\nn = 1", "context: takes text or a number"),
        ('"\\u001b[2J" = 1', "no option"),
    ],
)
def test_what_is_wrong_in_it_is_named(text: str, says: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(text)
    with pytest.raises(UsageError, match=r"config\.toml"):
        cli.parse(["run", "m"])
    assert cli.main(["run", "m", "hello"]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "\x1b" not in said


def test_commands_without_such_options_do_not_read_it(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text("context = [")
    assert cli.main(["list"]) == 0
    assert cli.main(["run", "--help"]) == 0
    assert "--worker" in capsys.readouterr().out
