"""An architecture that the installed gguf or llama.cpp lacks: the error says which release has it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import gguf
import pytest

from convert import quantize
from convert.converter import convert_checkpoint
from convert.file_types import file_type
from convert.releases import asked_for, known_architectures
from models.errors import ConversionFailed, UnsupportedError
from tests.checkpoints import tiny_checkpoint


@pytest.mark.parametrize("package", ["gguf", "llama-cpp-python"])
def test_the_release_that_is_named_is_the_one_that_the_tests_run_with(package: str) -> None:
    assert asked_for(package) == version(package)


def test_a_gguf_that_lacks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = {number: name for number, name in gguf.MODEL_ARCH_NAMES.items() if name != "llama"}
    monkeypatch.setattr(gguf, "MODEL_ARCH_NAMES", older)
    with pytest.raises(UnsupportedError, match=r"'llama'; gguf \d+\.\d+\.\d+ has it") as raised:
        convert_checkpoint(tiny_checkpoint(tmp_path / "tiny"), tmp_path / "out.gguf", file_type("F16"))
    assert raised.value.hint == f"pip install 'gguf=={version('gguf')}'"


def test_a_llama_cpp_that_lacks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = gguf.GGUFWriter(tmp_path / "nomad.gguf", "nomad")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ConversionFailed, match="unknown model architecture: 'nomad'"):
        quantize.check_structure(tmp_path / "nomad.gguf", {})
    # A family whose architecture this llama.cpp does not have: there is none, so one is made known.
    monkeypatch.setattr(quantize, "known_architectures", lambda: known_architectures() | {"nomad"})
    with pytest.raises(UnsupportedError, match=r"'nomad'; llama-cpp-python \d+\.\d+\.\d+ has it"):
        quantize.check_structure(tmp_path / "nomad.gguf", {})
