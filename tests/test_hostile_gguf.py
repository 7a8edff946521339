"""GGUF files with numbers that no model has, of which some end llama.cpp's process: never ours."""

from __future__ import annotations

import itertools
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

from convert.file_types import file_type
from convert.gguf_source import convert_gguf
from models.errors import HandmillError, ModelFileError
from runner.engine.local import load
from runner.engine.protocol import LoadOptions, Sampling
from tests.memory_models import write_model

VALUES = (0, 1, 3, 2**31 - 1, 2**32 - 1)
ARCHITECTURES = {"dense": "llama", "window": "gemma3", "recurrent": "mamba", "hybrid": "lfm2", "experts": "llama"}


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


PROGRAM = """
import sys
from pathlib import Path
from models.errors import HandmillError
from tests.test_hostile_gguf import use
for line in sys.stdin:
    try:
        use(Path(line.strip()))
    except HandmillError as error:
        print("named", error, flush=True)
    else:
        print("works", flush=True)
"""


ADDED: list[tuple[str, str, gguf.GGUFValueType, int | str]] = [
    ("dense", "nextn_predict_layers", gguf.GGUFValueType.UINT32, 1000),
    ("dense", "expert_count", gguf.GGUFValueType.UINT32, 1),
    ("dense", "rope.scaling.type", gguf.GGUFValueType.STRING, "foo"),
    ("window", "rope.dimension_count", gguf.GGUFValueType.UINT32, 1000),
    ("window", "rope.dimension_count_swa", gguf.GGUFValueType.UINT32, 1),
    ("hybrid", "rope.dimension_count", gguf.GGUFValueType.UINT32, 1),
]
"""Of all keys of llama.cpp, those that end it when they are added to a tiny model that has none."""


@pytest.mark.parametrize(("kind", "key", "type_", "value"), ADDED)
def test_a_key_that_no_such_model_has(
    kind: str, key: str, type_: gguf.GGUFValueType, value: int | str, tmp_path: Path
) -> None:
    path, architecture = tmp_path / "added.gguf", ARCHITECTURES[kind]
    reader = gguf.GGUFReader(write_model(kind, tmp_path))
    details = {f"{architecture}.{key}": MetadataDetails(type_, value)}
    copy_with_new_metadata(reader, gguf.GGUFWriter(path, architecture), details, [])
    with pytest.raises(ModelFileError, match=rf"added\.gguf.*\b{value}\b"):
        use(path)


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_loading_ends_with_a_reply_or_a_named_error(kind: str, tmp_path: Path) -> None:
    files: list[Path] = []
    for values in (VALUES, VALUES[3:] + VALUES[:3]):
        folder = tmp_path / str(values[0])
        folder.mkdir()
        files += [path for _, path in bent(kind, folder, values)]
    lines = "".join(f"{path}\n" for path in files)
    # In a process of its own: were one to end it, the last file that it looked at would be missing.
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=lines, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == len(files), files[len(said)]
    assert sum(line.startswith("named ") for line in said) > 3
