"""Memories on disk: taken up by the next process, and never trusted."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.library import home
from runner.engine import state_files
from runner.engine.local import load
from runner.engine.protocol import LoadOptions, Sampling
from runner.engine.snapshots import Checkpoint, Snapshot
from runner.engine.state_files import StateFiles, model_key
from tests.memory_models import KINDS, write_model
from tests.test_reuse import words

OPTIONS = LoadOptions(context=2048, gpu_layers=0, threads=1, kv_types=("f32", "f32"))
ONE = Sampling(temperature=0.0, max_tokens=1)


def snapshot(n: int = 600, first: int = 0) -> Snapshot:
    data = np.arange(5000, dtype=np.uint8)
    return Snapshot(tuple(range(n)), first, data, (Checkpoint(100, data[:70]), Checkpoint(n - 1, data[:9])))


def store(folder: Path, key: str = "model", limit: int = 1 << 30) -> StateFiles:
    return StateFiles(folder, lambda: key, limit)


def asked(model: Path, tokens: list[int], marks: tuple[int, ...] = (), options: LoadOptions = OPTIONS) -> int:
    """How many tokens a new engine finds computed."""
    with load(model, options) as engine:
        return list(engine.generate(tokens, ONE, marks=marks))[-1].stats.cached_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_process_goes_on_from_it(kind: str, tmp_path: Path) -> None:
    model, document = write_model(kind, tmp_path), words(1, 900)
    assert asked(model, [*document, *words(2, 50)], (900,)) == 0
    assert asked(model, [*document, *words(3, 40)], (900,)) == 900
    assert asked(model, document[:300]) == 0  # too little to be worth a file


def test_only_for_the_same_model_and_settings(tmp_path: Path) -> None:
    model, document = write_model("dense", tmp_path), words(1, 900)
    asked(model, document)
    assert asked(model, document) == 899
    assert asked(model, document, options=replace(OPTIONS, kv_types=("f16", "f16"))) == 0
    assert asked(model, document, options=replace(OPTIONS, cache=0)) == 0
    os.utime(model, (1, 1))
    assert asked(model, document) == 0


def test_it_is_for_the_owner_only(tmp_path: Path) -> None:
    asked(write_model("dense", tmp_path), words(1, 900))
    (path,) = (home() / "states").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("harm", ["cut", "longer", "flipped", "empty", "header", "magic", "nested"])
def test_what_is_damaged_is_deleted_and_computed_again(harm: str, tmp_path: Path) -> None:
    model, document = write_model("hybrid", tmp_path), words(1, 900)
    asked(model, document)
    (path,) = (home() / "states").iterdir()
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[8:12], "little")
    if harm == "flipped":
        data[-100] ^= 1
    elif harm == "header":
        data[12 : 12 + length] = data[12 : 12 + length].replace(b'"n_tokens": 900', b'"n_tokens": 999')
    elif harm == "nested":
        data[12 : 12 + length] = b"[" * length
    elif harm == "magic":
        data[:4] = b"GGUF"
    damaged = {"cut": data[:-1], "longer": data + b"x", "empty": bytearray()}
    path.write_bytes(damaged.get(harm, data))
    with load(model, OPTIONS) as engine:
        assert list(engine.generate(document, ONE))[-1].stats.cached_tokens == 0
        assert not path.exists()
    assert asked(model, document) == 899


def test_every_flip_of_a_byte_is_seen(tmp_path: Path) -> None:
    states = store(tmp_path)
    states.write(snapshot())
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        for state in states.stored():
            assert states.read(state) is None
        assert not path.exists()


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    states, written = store(tmp_path), snapshot(first=3)
    states.write(written)
    (state,) = states.stored()
    read = states.read(state)
    assert read is not None
    assert (read.tokens, read.first) == (written.tokens, 3)
    assert [point.n for point in read.checkpoints] == [100, 599]
    for ours, theirs in zip(
        (read.data, read.checkpoints[1].data), (written.data, written.checkpoints[1].data), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert not list(store(tmp_path, "another").stored())


def test_a_longer_one_takes_the_place_of_its_beginning(tmp_path: Path) -> None:
    states = store(tmp_path)
    for n in (600, 700):
        states.write(snapshot(n))
    assert [len(state.tokens) for state in states.stored()] == [700]


def test_the_oldest_go_beyond_the_limit(tmp_path: Path) -> None:
    states = store(tmp_path, limit=20_000)
    for i in range(4):
        states.write(replace(snapshot(), tokens=tuple(range(i, 600 + i))))
        for path in tmp_path.iterdir():
            os.utime(path, ns=(path.stat().st_mtime_ns - 10**9,) * 2)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000
    assert {state.tokens[0] for state in states.stored()} == {2, 3}
    store(tmp_path, limit=100).write(snapshot(800))  # larger than all that is allowed
    assert 800 not in [len(state.tokens) for state in states.stored()]


def test_a_disk_that_is_full_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_files, "_write", fail)
    assert asked(write_model("dense", tmp_path), words(1, 900)) == 0
    assert not list((home() / "states").iterdir())


def test_a_model_is_told_by_what_is_in_it(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"a" * 100_000)
    other.write_bytes(b"a" * 50_000 + b"b" + b"a" * 49_999)
    for path in (one, other):
        os.utime(path, (1, 1))
    assert model_key(one, ()) != model_key(other, ())
    assert model_key(one, ()) != model_key(one, ("f16",))
