"""Settings that are found by measuring: on an engine whose speeds the test sets, and on a real one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models.errors import LoadError
from runner import tuning
from runner.cli import main as cli
from runner.engine import local, start
from runner.engine.protocol import LoadOptions, Sampling
from runner.tuning import Tuned, tune, with_tuned

OPEN = LoadOptions(context=512)
Rate = Callable[[LoadOptions], tuple[float, float]]
"""Tokens per second that are read and written with these options."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HANDMILL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class Bench:
    """Loads engines of four threads whose speeds follow from the options."""

    def __init__(self, rate: Rate, layers: int = 0) -> None:
        self._rate, self._layers = rate, layers
        self.loaded: list[LoadOptions] = []

    def load(self, path: Path, options: LoadOptions) -> Any:
        self.loaded.append(options)
        return _Engine(self._rate(options), self._layers if options.gpu_layers == "auto" else int(options.gpu_layers))


class _Engine:
    def __init__(self, rate: tuple[float, float], layers: int) -> None:
        self._rate = rate
        self.info = SimpleNamespace(n_ctx=8192, gpu_layers=layers, threads=4)

    def speeds(self, **_: object) -> Iterator[Any]:
        return (SimpleNamespace(tokens_per_second=rate) for rate in self._rate)

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Only its name and bytes matter. The machine that it is on has eight processors."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(5000))
    return path


def test_each_setting_is_tried_on_top_of_the_best(model: Path) -> None:
    def rate(options: LoadOptions) -> tuple[float, float]:
        reading = 2000.0 * (2 if options.batch == 1024 else 1) * (1.5 if options.batch_threads == 8 else 1)
        return 1.5 * reading, 1500.0 * (1.2 if options.threads == 3 else 1)

    bench, said = Bench(rate), list[str]()
    best, gain = tune(model, OPEN, bench.load, said.append)
    assert best == Tuned(threads=3, batch_threads=8, batch=1024)
    assert gain == pytest.approx((512 / 3000 + 128 / 1500) / (512 / 9000 + 128 / 1800))
    assert said[0].startswith("as planned: 0.26 s")
    assert said[-1] == "kept: threads 3, batch threads 8, batch 1024, 2.00 times as fast as planned"
    assert all(options.cache == 0 and not options.speculate for options in bench.loaded)
    assert with_tuned(model, OPEN) == replace(OPEN, threads=3, batch_threads=8, batch=1024)


def test_layers_are_tried_where_there_are_some(model: Path) -> None:
    """A slow line to another machine: fewer layers there are faster."""

    def rate(options: LoadOptions) -> tuple[float, float]:
        return 1000.0, 10.0 if options.gpu_layers == "auto" else 10.0 + (20 - int(options.gpu_layers))

    best, _ = tune(model, OPEN, Bench(rate, layers=20).load)
    assert best == Tuned(gpu_layers=0)
    given = replace(OPEN, gpu_layers=20)
    assert tune(model, given, Bench(rate, layers=20).load)[0] == Tuned()
    assert with_tuned(model, given) == given
    assert with_tuned(model, OPEN).gpu_layers == 0


def test_noise_is_no_gain_and_nothing_is_worse_than_the_plan(model: Path, home: Path) -> None:
    assert (
        tune(model, OPEN, Bench(lambda options: (1000.0, 100.0 if options.batch is None else 101.0)).load)[0]
        == Tuned()
    )
    quick = iter([1.0, 1.0] + [5.0] * 100)  # the plan's first measurement was slow by chance
    lucky = Bench(lambda options: (1000.0, 100.0 * next(quick)))
    assert tune(model, OPEN, lucky.load) == (Tuned(), 1.0)
    assert with_tuned(model, OPEN) == OPEN
    assert json.loads((home / "tuned.json").read_text()) == {}


def test_what_the_person_sets_is_left_alone(model: Path) -> None:
    given = LoadOptions(context=512, threads=2, batch=512, flash_attention=True)
    bench = Bench(lambda options: (1000.0, 100.0))
    tune(model, given, bench.load)
    assert len(bench.loaded) == 1
    tune(model, OPEN, Bench(lambda options: (1000.0, 150.0 if options.threads == 2 else 100.0)).load)
    assert with_tuned(model, replace(OPEN, threads=7)).threads == 7


def test_what_cannot_be_loaded_is_passed_over(model: Path) -> None:
    def rate(options: LoadOptions) -> tuple[float, float]:
        if options.batch is not None:
            raise LoadError("no memory for it")
        return 1000.0, 100.0

    assert tune(model, OPEN, Bench(rate).load)[0] == Tuned()


def test_another_file_machine_or_setting_has_its_own(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(model, OPEN, Bench(lambda options: (1000.0, 150.0 if options.threads == 2 else 100.0)).load)
    assert with_tuned(model, OPEN).threads == 2
    assert with_tuned(model, replace(OPEN, context=1024)).threads is None
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    assert with_tuned(model, OPEN).threads is None
    monkeypatch.undo()
    model.write_bytes(bytes(6000))
    assert with_tuned(model, OPEN).threads is None


@pytest.mark.parametrize(
    "kept",
    [
        "not json",
        "[]",
        '{"KEY": 3}',
        '{"KEY": {"colour": 1}}',
        '{"KEY": {"threads": 100000, "batch": -1, "gpu_layers": "x", "flash_attention": 7, "batch_threads": true}}',
    ],
)
def test_a_file_that_was_changed_does_no_harm(kept: str, model: Path, home: Path) -> None:
    home.mkdir()
    (home / "tuned.json").write_text(kept.replace("KEY", tuning._key(model, OPEN)))
    assert with_tuned(model, OPEN) == OPEN


def test_a_real_model(
    starter_model: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_SECONDS", 0.1)
    assert cli.main(["fit", str(starter_model), "--tune", "-c", "512", "-g", "0", "--json"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("tuning: as planned: ")
    assert "tuning: kept: " in said.err
    assert json.loads(said.out)["fits"] is True
    home.joinpath("tuned.json").write_text(
        json.dumps({tuning._key(starter_model, LoadOptions(context=512, gpu_layers=0)): {"batch": 64, "threads": 1}})
    )
    with start.load(starter_model, LoadOptions(context=512, gpu_layers=0)) as engine:
        assert (engine.info.batch, engine.info.threads) == (64, 1)
    assert cli.main(["fit", str(starter_model), "-c", "512", "-g", "0"]) == 0
    assert "note: tuned: threads 1, batch 64" in capsys.readouterr().out


def test_other_batches_and_no_flash_attention_compute_the_same(starter_model: Path) -> None:
    replies = []
    for more in ({}, {"batch": 64}, {"batch": 128, "batch_threads": 1}, {"flash_attention": False}):
        options = LoadOptions(context=1024, gpu_layers=0, cache=0, **more)
        with local.load(starter_model, options) as engine:
            prompt = engine.encode_text("The miller went to the river. " * 30)
            replies.append([chunk.token for chunk in engine.generate(prompt, Sampling(temperature=0, max_tokens=12))])
    assert all(reply == replies[0] for reply in replies)
