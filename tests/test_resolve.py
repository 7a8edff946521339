"""What MODEL stands for, with the real converter on a tiny checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from convert import converter
from models import library
from models.errors import CheckpointError, HubError, LibraryError, ModelFileError, UsageError
from models.gguf_file import read_gguf
from runner.cli.resolve import checkpoint_source, remember_conversion, resolve_local_model, resolve_model
from tests.checkpoints import tiny_checkpoint
from tests.hub_server import Hub, serve


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    tiny_checkpoint(folder)
    return folder


def put(name: str, starter_model: Path) -> Path:
    library.models_folder().mkdir(parents=True, exist_ok=True)
    path = library.models_folder() / name
    path.symlink_to(starter_model)
    return path


def test_a_path_comes_before_a_name_and_a_name_before_the_hub(
    starter_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = put("kin.gguf", starter_model)
    assert resolve_model("kin") == named
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kin").symlink_to(starter_model)
    assert resolve_model("kin") == Path("kin")
    assert resolve_model(str(starter_model)) == starter_model


def test_a_checkpoint_is_converted_once(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = resolve_model(str(tiny))
    assert made == library.models_folder() / "tiny-Q4_K_M.gguf"
    assert read_gguf(made).file_type == "Q4_K_M"
    assert "Converting" in capsys.readouterr().err

    def never(*_: object, **__: object) -> None:
        raise AssertionError("converted again")

    with monkeypatch.context() as patched:
        patched.setattr(converter, "convert_checkpoint", never)
        assert resolve_model(str(tiny)) == made
        patched.chdir(tiny)
        assert resolve_model(".") == made
    before = made.stat().st_mtime_ns
    os.utime(tiny / "config.json", ns=(1, before + 10**9))
    assert resolve_model(str(tiny), quiet=True) == made
    assert made.stat().st_mtime_ns > before


def test_another_checkpoint_of_that_name_gets_another_file(tiny: Path, tmp_path: Path) -> None:
    first = resolve_model(str(tiny))
    tiny_checkpoint(tmp_path / "elsewhere" / "tiny")
    second = resolve_model(str(tmp_path / "elsewhere" / "tiny"))
    assert (first.name, second.name) == ("tiny-Q4_K_M.gguf", "tiny-2-Q4_K_M.gguf")
    assert resolve_model(str(tiny)) == first


def test_what_convert_wrote_is_not_converted_again(tiny: Path, starter_model: Path, tmp_path: Path) -> None:
    made = put("tiny-Q4_K_M.gguf", starter_model)
    remember_conversion(tiny, "Q4_K_M", made)
    assert resolve_model(str(tiny)) == made
    remember_conversion(tiny, "Q8_0", tmp_path / "outside.gguf")  # a file of the person's own is none of ours
    assert library.origin(tmp_path / "outside.gguf") is None


def test_a_checkpoint_on_the_hub_is_fetched_converted_and_then_found_here(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(Hub({"kin/small": files})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        made = resolve_model("kin/small:q8_0")
        assert read_gguf(made).file_type == "Q8_0"
        assert made.name == "small-Q8_0.gguf"
        with pytest.raises(UsageError, match="NONSENSE"):
            resolve_model("kin/small:nonsense")
    assert resolve_model("kin/small:Q8_0") == made
    folder, name, kind = checkpoint_source("kin/small:q8_0")
    assert (folder, name, kind) == (library.checkpoints_folder() / "kin--small", "small", "Q8_0")
    with pytest.raises(HubError, match=r"no file or directory kin/other"):
        checkpoint_source("kin/other")


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for text, kind in (
        ("nothing", LibraryError),
        ("starter", LibraryError),
        ("./nothing.gguf", ModelFileError),
        ("/a/b/c", ModelFileError),
        ("a\0b", LibraryError),
        ("x" * 5000, LibraryError),
        ("~/x/y", ModelFileError),
    ):
        with pytest.raises(kind) as caught:
            resolve_model(text)
        assert str(caught.value).isprintable()
    with pytest.raises(CheckpointError):
        resolve_model(str(tmp_path))


def test_no_model_is_the_starter_wherever_one_stands(
    starter_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "starter").mkdir()
    monkeypatch.chdir(tmp_path)
    for resolve in (resolve_model, resolve_local_model):
        with pytest.raises(LibraryError, match="the starter model is not there yet"):
            resolve(None)
    starter = put("SmolLM2-135M-Instruct.Q4_1.gguf", starter_model)
    assert resolve_model(None) == resolve_local_model(None) == starter


def test_show_neither_fetches_nor_converts(tiny: Path, starter_model: Path) -> None:
    with pytest.raises(ModelFileError, match="is a directory"):
        resolve_local_model(str(tiny))
    with pytest.raises(LibraryError):
        resolve_local_model("kin/small")
    used = put("a.gguf", starter_model)
    library.remember_used(used)
    assert resolve_local_model(None) == used.resolve()
