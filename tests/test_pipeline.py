"""Rows from shards to their places in the file, on many threads, and what ends that early."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from convert import pipeline
from convert.converter import ConversionPlan, plan_conversion
from convert.file_types import file_type
from convert.pipeline import DataStart, write_tensors
from models.errors import OutputError, TensorError, TokenizerError
from tests.checkpoints import tiny_checkpoint


@pytest.fixture
def plan(tmp_path: Path) -> ConversionPlan:
    return plan_conversion(tiny_checkpoint(tmp_path / "tiny", shards=1, attention_bias=True), file_type("Q8_0"))


def at(position: int) -> DataStart:
    return lambda wait: [position]


@pytest.fixture
def write(plan: ConversionPlan, tmp_path: Path) -> Callable[..., bytes]:
    def write(
        threads: int = 2, progress: Callable[[int], None] = lambda n: None, data_start: DataStart | None = None
    ) -> bytes:
        path = tmp_path / "partial"
        path.write_bytes(bytes(plan.n_bytes))
        write_tensors(
            plan.tensors, [path], data_start=data_start or at(len(plan.header)), threads=threads, progress=progress
        )
        return path.read_bytes()

    return write


@pytest.mark.parametrize("weights", [1, 64, 1000, 3333, 1 << 30])
def test_the_size_of_a_slab_changes_nothing(
    write: Callable[..., bytes], weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write()
    monkeypatch.setattr(pipeline, "SLAB_WEIGHTS", weights)
    assert write() == expected
    assert write(threads=5) == expected


@pytest.mark.parametrize("bytes_waiting", [0, 1 << 30])
def test_slabs_wait_until_it_is_known_where_they_go(
    plan: ConversionPlan, write: Callable[..., bytes], bytes_waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write()
    monkeypatch.setattr(pipeline, "_WAITING_BYTES", bytes_waiting)
    asked: list[bool] = []

    def data_start(wait: bool) -> list[int] | None:
        asked.append(wait)
        return [len(plan.header)] if wait else None

    assert write(data_start=data_start) == expected
    # with no room all are asked to wait; with room only what is left when a thread finds no more slabs
    assert asked.count(True) == (len(asked) if bytes_waiting == 0 else 2)


def test_a_place_that_never_comes_ends_it(write: Callable[..., bytes]) -> None:
    def data_start(wait: bool) -> list[int] | None:
        raise TokenizerError("there is no tokenizer")

    with pytest.raises(TokenizerError):
        write(data_start=data_start)


def test_progress_counts_the_weights(plan: ConversionPlan, write: Callable[..., bytes]) -> None:
    told: list[int] = []
    callers = set()

    def progress(n: int) -> None:
        told.append(n)
        callers.add(threading.current_thread())

    write(progress=progress)
    assert told == sorted(told)
    assert told[-1] == plan.n_weights
    assert callers == {threading.current_thread()}


def test_every_byte_of_a_tensor_is_written(plan: ConversionPlan, tmp_path: Path) -> None:
    """Over a file of ones, only the padding keeps them."""
    path = tmp_path / "partial"
    path.write_bytes(b"\xff" * plan.n_bytes)
    write_tensors(plan.tensors, [path], data_start=at(32), threads=2, progress=lambda n: None)
    first = path.read_bytes()
    path.write_bytes(bytes(plan.n_bytes))
    write_tensors(plan.tensors, [path], data_start=at(32), threads=2, progress=lambda n: None)
    second = path.read_bytes()
    for tensor in plan.tensors:
        place = slice(32 + tensor.offset, 32 + tensor.offset + tensor.nbytes)
        assert first[place] == second[place]


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread is not threading.main_thread()]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_waits_for_the_threads(write: Callable[..., bytes], error: type[BaseException]) -> None:
    before = workers()

    def progress(n: int) -> None:
        raise error

    with pytest.raises(error):
        write(progress=progress)
    assert workers() == before


def test_a_shard_that_shrinks_while_it_is_read(plan: ConversionPlan, write: Callable[..., bytes]) -> None:
    shard = plan.checkpoint.path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    before = workers()
    with pytest.raises(TensorError, match=r"model\.safetensors was cut short while it was read"):
        write()
    assert workers() == before


def test_a_shard_that_is_gone(plan: ConversionPlan, write: Callable[..., bytes]) -> None:
    (plan.checkpoint.path / "model.safetensors").unlink()
    with pytest.raises(TensorError, match=r"cannot read .*: No such file"):
        write()


def test_an_output_that_cannot_be_opened(plan: ConversionPlan, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        write_tensors(plan.tensors, [tmp_path / "absent"], data_start=at(0), threads=2, progress=lambda n: None)


def test_an_output_that_takes_no_more(plan: ConversionPlan) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full here")
    with pytest.raises(OutputError, match="cannot write /dev/full") as raised:
        write_tensors(plan.tensors, [full], data_start=at(0), threads=2, progress=lambda n: None)
    assert "disk is full" in raised.value.hint
