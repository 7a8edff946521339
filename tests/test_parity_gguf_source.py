"""A GGUF file as the source gives the bytes of llama-quantize."""

from __future__ import annotations

from pathlib import Path

import pytest

from convert.converter import convert_checkpoint
from convert.file_types import FILE_TYPES, file_type
from convert.gguf_source import convert_gguf
from tests.checkpoints import Dtype, tiny_checkpoint
from tests.family_cases import CASES
from tests.family_checkpoints import make_checkpoint
from tests.peer import need_peer, peer_quantize

pytestmark = pytest.mark.parity

SOURCES: tuple[Dtype, ...] = ("F32", "F16", "BF16")
KINDS = [kind for kind in FILE_TYPES.values() if not kind.needs_matrix]


@pytest.fixture(scope="module", autouse=True)
def _oracles() -> None:
    need_peer()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return tiny_checkpoint(folder, hidden_size=256, intermediate_size=512, attention_bias=True)


def assert_equal(source: Path, name: str, folder: Path, *, requantize: bool = False) -> None:
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    convert_gguf(source, ours, file_type(name), force=True, requantize=requantize, check=False)
    peer_quantize(source, theirs, name, ["--allow-requantize"] if requantize else [])
    assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.mark.parametrize("held", SOURCES)
def test_every_type(held: Dtype, checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    convert_checkpoint(checkpoint, source, file_type(held), check=False)
    for kind in KINDS if held == "F16" else (FILE_TYPES["BF16"], FILE_TYPES["Q4_K_M"], FILE_TYPES["Q8_0"]):
        assert_equal(source, kind.name, tmp_path)


@pytest.mark.parametrize("held", [kind.name for kind in KINDS if kind.bits_per_weight < 16])
def test_quantized_again(held: str, checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    convert_checkpoint(checkpoint, source, file_type(held), check=False)
    for name in ("F16", "Q4_K_M"):
        assert_equal(source, name, tmp_path, requantize=True)


@pytest.mark.parametrize("held", [300_000, 1_000_000])
def test_a_source_in_parts(held: int, checkpoint: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(checkpoint, tmp_path / "source.gguf", file_type("F16"), split_size=held, check=False)
    assert len(report.paths) > 1
    assert_equal(report.path, "Q4_K_M", tmp_path)


@pytest.mark.parametrize("case", ["mixtral", "deepseek2", "gpt-oss", "lfm2"])
def test_other_architectures(case: str, starter_model: Path, tmp_path: Path) -> None:
    """Experts, latent attention, MXFP4, a hybrid."""
    make_checkpoint(CASES[case], tmp_path / "checkpoint", starter_model)
    source = tmp_path / "source.gguf"
    convert_checkpoint(tmp_path / "checkpoint", source, file_type("BF16"), check=False)
    for name in ("Q4_K_M", "MXFP4_MOE"):
        assert_equal(source, name, tmp_path)
