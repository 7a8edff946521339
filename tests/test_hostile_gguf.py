"""GGUF files with numbers that no model has, of which some end llama.cpp's process: never ours."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest

from convert.file_types import file_type
from convert.gguf_source import convert_gguf
from models.errors import HandmillError
from runner.engine.local import load
from runner.engine.protocol import LoadOptions, Sampling
from tests.memory_models import write_model

VALUES = (0, 1, 3, 2**31 - 1, 2**32 - 1)
ARCHITECTURES = {"dense": "llama", "window": "gemma3", "recurrent": "mamba", "hybrid": "lfm2"}


def bent(kind: str, folder: Path, values: tuple[int, ...]) -> Iterator[tuple[str, Path]]:
    """Copies of a tiny model, each with one of its numbers replaced by one of `values` in turn."""
    whole = write_model(kind, folder)
    reader = gguf.GGUFReader(whole)
    data = bytearray(whole.read_bytes())
    turn = itertools.cycle(values)
    for name, field in reader.fields.items():
        if not name.startswith(ARCHITECTURES[kind]) or field.types[0] != gguf.GGUFValueType.UINT32:
            continue
        at = field.offset + 8 + len(name) + 4
        assert struct.unpack_from("<I", data, at)[0] == field.contents()
        value = next(turn)
        copy = bytearray(data)
        struct.pack_into("<I", copy, at, value)
        path = folder / f"bent-{name}-{value}.gguf"
        path.write_bytes(copy)
        yield f"{name} = {value}", path


def use(path: Path) -> None:
    with load(path, LoadOptions(context=64, gpu_layers=0, threads=1, cache=0)) as engine:
        list(engine.generate([5, 6, 7], Sampling(temperature=0.0, max_tokens=2)))


@pytest.mark.parametrize("kind", ["window", "hybrid"])
def test_conversion_ends_with_a_file_or_a_named_error(kind: str, tmp_path: Path) -> None:
    failed: list[str] = []
    for what, path in bent(kind, tmp_path, VALUES):
        output = tmp_path / "out.gguf"
        try:
            convert_gguf(path, output, file_type("Q8_0"), force=True)
        except HandmillError as error:
            failed.append(f"{what}: {error}")
    assert len(failed) > 3
    assert not any(line.endswith(": ") for line in failed)
    assert not list(tmp_path.glob("*.partial*"))
