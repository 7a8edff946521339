"""`handmill bench`: what it measures, and what it says of it. How fast a machine is, no test can know."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from models.errors import LoadError
from runner.bandwidth import device_speed, memory_bandwidth
from runner.cli import main as cli
from runner.engine.local import load
from runner.engine.protocol import LoadOptions
from tests.memory_models import KINDS, write_model

QUICK = ["-p", "16", "-n", "4", "-r", "2", "-g", "0", "-d", "0"]


def test_json_has_the_documented_fields(starter_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(starter_model), *QUICK, "--json", "-q", "-d", "0,32", "-j", "1"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["test"], row["depth"]) for row in rows] == [("pp16", 0), ("tg4", 0), ("pp16", 32), ("tg4", 32)]
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert row["spread"] >= 0
        assert (row["threads"], row["batch"], row["gpu_layers"], row["device"]) == (1, 512, 0, "CPU")
        assert row["peak_bytes"] > starter_model.stat().st_size // 2
        assert (row["memory_share"] is None) == row["test"].startswith("pp")


def test_the_table_and_the_pictures(starter_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, magic in (("speed.svg", b"<?xml"), ("speed.png", b"\x89PNG")):
        picture = tmp_path / name
        assert cli.main(["bench", str(starter_model), *QUICK, "-d", "0,8", "--plot", str(picture)]) == 0
        assert picture.read_bytes().startswith(magic)
    out = capsys.readouterr().out
    assert "tok/s" in out
    assert "tg4" in out
    assert "memory at its peak" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-c", "16", "-d", "4000"], "no test fits"),
        (["--plot", "missing/speed.svg"], "cannot write"),
    ],
)
def test_what_cannot_be_measured(
    starter_model: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", str(starter_model), "-q", *QUICK, *argv]) == 2
    assert said in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(
    starter_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", str(starter_model), "--plot", "x.svg", *QUICK]) == 2
    assert "handmill[plot]" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--plot", "x.jpg"], ["-d", "1,x"], ["-r", "0"]])
def test_bad_options_are_usage_errors(options: list[str]) -> None:
    assert cli.main(["bench", "m", *options]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_every_round_begins_at_its_depth(kind: str, tmp_path: Path) -> None:
    with load(write_model(kind, tmp_path), LoadOptions(context=256, gpu_layers=0, threads=1, cache=0)) as engine:
        held = [len(engine.context.held) for _ in engine.speeds(prompt=8, generate=4, depths=[0, 50], rounds=2)]
        assert held == [8, 4, 58, 54]


def test_a_slow_device_gives_signs_of_life(starter_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []
    monkeypatch.setattr("runner.bench._SIGN_SECONDS", 0.0)
    monkeypatch.setattr("runner.bench.announce", said.append)
    with load(starter_model, LoadOptions(context=256, gpu_layers=0, threads=1, cache=0)) as engine:
        list(engine.speeds(prompt=0, generate=4, depths=[0], rounds=2))
    assert said == [1] * (1 + 2 * 4)  # once before it is measured


def test_bandwidth_is_that_of_a_machine() -> None:
    assert 1e8 < (memory_bandwidth(1) or 0) < 1e13


def test_where_little_memory_is_left_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.bandwidth.available_memory", lambda: 200_000_000)
    assert memory_bandwidth(1) is None
    with pytest.raises(LoadError, match="CPU has no"):
        device_speed("CPU")


def test_the_rate_of_a_device_is_that_of_reading_its_weights() -> None:
    """A device that answers before it is done would come out a thousand times faster."""
    bandwidth = memory_bandwidth(1) or 0
    for kind in ("F16", "Q4_1"):
        assert bandwidth / 200 < device_speed("CPU", kind, 1).bytes_per_second < 4 * bandwidth


def test_a_device_that_is_not_there_has_no_rate() -> None:
    with pytest.raises(LoadError, match="no device GPU7"):
        device_speed("GPU7")
