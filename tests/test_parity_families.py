"""Every family against transformers in float32, and against llama.cpp's own converter."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from convert.converter import convert_checkpoint
from convert.file_types import file_type
from models.errors import UnsupportedError
from models.families import registry
from models.gguf_file import LazyArray, read_gguf
from models.native import forward_pass, open_vocabulary
from tests.family_cases import CASES, DIFFERENCES, PEER_FAILS, REFUSED
from tests.family_checkpoints import TEXT, expected_ids, expected_logits, make_checkpoint
from tests.peer import need_peer, peer_convert

pytestmark = pytest.mark.parity

NAMES = ("general.name", "general.basename", "general.finetune", "general.version", "general.description")
"""What llama.cpp guesses from the folder's name."""

PENDING = {"llama-dynamic", "qwen2-dynamic"}
"""Cases of converted families that wait for a scaling the converter does not know yet."""

CONVERTED = [name for name, case in CASES.items() if case.architecture in registry() and name not in PENDING]


@dataclass(frozen=True)
class Converted:
    name: str
    checkpoint: Path
    ours: Path


@pytest.fixture(scope="module", autouse=True)
def _oracles() -> None:
    need_peer()


@pytest.fixture(scope="module")
def converted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, starter_model: Path
) -> Iterator[Converted]:
    folder = tmp_path_factory.mktemp("family")
    checkpoint, ours = (
        folder / "checkpoint",
        folder / "ours.gguf",
    )  # a name may hold "phi3", by which llama.cpp looks for tokens
    make_checkpoint(CASES[request.param], checkpoint, starter_model)
    convert_checkpoint(checkpoint, ours, file_type("F32"))
    yield Converted(request.param, checkpoint, ours)
    shutil.rmtree(folder)


COMPUTED = [name for name in CONVERTED if not CASES[name].approximated]


@pytest.mark.parametrize("converted", COMPUTED, indirect=True)
def test_logits_are_those_of_transformers(converted: Converted) -> None:
    ids = expected_ids(converted.checkpoint)
    with open_vocabulary(converted.ours) as vocabulary:
        assert vocabulary.tokenize(TEXT, add_special=True, parse_special=True) == ids
    expected = expected_logits(CASES[converted.name], converted.checkpoint, ids)
    for n in (len(ids), len(ids) // 2):
        logits = forward_pass(converted.ours, ids[:n], threads=2)
        assert cosine(logits, expected[n - 1]) > 0.9999, f"after {n} tokens"
        assert logits.argmax() == expected[n - 1].argmax(), f"after {n} tokens"


@pytest.mark.parametrize("converted", [name for name in CONVERTED if name not in PEER_FAILS], indirect=True)
def test_equals_the_converter_of_llama_cpp(converted: Converted, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.gguf"
    peer_convert(converted.checkpoint, theirs, "f32", CASES[converted.name].peer_options)
    differences = DIFFERENCES.get(converted.name, {})
    our_keys, our_tensors = read(converted.ours)
    their_keys, their_tensors = read(theirs)
    # A difference that is explained must be there, or the explanation is out of date.
    assert differing(our_keys, their_keys) | differing(our_tensors, their_tensors) == set(differences)


@pytest.mark.parametrize("converted", [name for name in CONVERTED if name in PEER_FAILS], indirect=True)
def test_the_converter_of_llama_cpp_still_fails(converted: Converted, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.gguf"
    try:
        peer_convert(converted.checkpoint, theirs, "f32", CASES[converted.name].peer_options)
    except RuntimeError:
        return
    assert read(converted.ours) != read(theirs)


@pytest.mark.parametrize(
    "name", [name for name, refusal in REFUSED.items() if refusal.case.architecture in registry()]
)
def test_what_llama_cpp_computes_otherwise_is_refused(name: str, tmp_path: Path, starter_model: Path) -> None:
    make_checkpoint(REFUSED[name].case, tmp_path / "checkpoint", starter_model)
    with pytest.raises(UnsupportedError, match=REFUSED[name].field):
        convert_checkpoint(tmp_path / "checkpoint", tmp_path / "ours.gguf", file_type("F32"))


def cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    assert one.shape == other.shape
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def differing(ours: Mapping[str, object], theirs: Mapping[str, object]) -> set[str]:
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


def read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """The keys of a file, and of each tensor its type, shape and bytes."""
    file = read_gguf(path)
    data = path.read_bytes()
    keys = {k: list(v) if isinstance(v, LazyArray) else v for k, v in file.metadata.items() if k not in NAMES}
    return keys, {t.name: (t.type, t.shape, data[t.offset : t.offset + t.nbytes]) for t in file.tensors}
