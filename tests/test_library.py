from __future__ import annotations

import json
from pathlib import Path

import pytest

from models import library
from models.errors import LibraryError, OutputError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HANDMILL_HOME", str(tmp_path / "home"))
    models = library.models_folder()
    models.mkdir(parents=True)
    return models


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"GGUF")


def test_home_follows_the_environment_and_else_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert library.home() == tmp_path / "home"
    monkeypatch.delenv("HANDMILL_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert library.home().name == "handmill"


def test_the_folder_is_the_truth(folder: Path) -> None:
    put(folder, "b.gguf", "A.GGUF", ".hidden.gguf", "notes.txt", "part.gguf.tmp")
    (folder / "dir.gguf").mkdir()
    assert [m.name for m in library.list_models()] == ["A", "b"]
    (folder / "b.gguf").unlink()
    assert [m.name for m in library.list_models()] == ["A"]


def test_no_folder_is_an_empty_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HANDMILL_HOME", str(tmp_path / "nowhere"))
    assert library.list_models() == []
    assert library.last_used() is None


def test_a_split_model_is_one_model(folder: Path) -> None:
    put(folder, "big-Q8_0-00002-of-00002.gguf", "big-Q8_0-00001-of-00002.gguf")
    (model,) = library.list_models()
    assert (model.name, model.path.name, model.size) == ("big-Q8_0", "big-Q8_0-00001-of-00002.gguf", 8)
    library.remove_model(model)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("Qwen2-0.5B-Q4_K_M", "Qwen2-0.5B-Q4_K_M"),
        ("qwen2-0.5b-q4_k_m.gguf", "Qwen2-0.5B-Q4_K_M"),
        ("qwen2-0.5b:q8_0", "Qwen2-0.5B-Q8_0"),
        ("SmolLM2:Q4_1", "SmolLM2.Q4_1"),
        ("smol", "SmolLM2.Q4_1"),
        ("case", "case"),
        ("CASE", "CASE"),
    ],
)
def test_finds_by_name_type_and_beginning(folder: Path, asked: str, found: str) -> None:
    put(folder, "Qwen2-0.5B-Q4_K_M.gguf", "Qwen2-0.5B-Q8_0.gguf", "SmolLM2.Q4_1.gguf", "case.gguf", "CASE.gguf")
    assert library.find_model(asked).name == found


def test_says_what_comes_close(folder: Path) -> None:
    put(folder, "Qwen2-0.5B-Q4_K_M.gguf", "Qwen2-0.5B-Q8_0.gguf", "SmolLM2.Q4_1.gguf")
    with pytest.raises(LibraryError, match="beginning of 2 models") as caught:
        library.find_model("qwen2")
    assert "Qwen2-0.5B-Q8_0" in caught.value.hint
    with pytest.raises(LibraryError, match="no model 'SmolML2") as caught:
        library.find_model("SmolML2.Q4_1")
    assert "SmolLM2.Q4_1" in caught.value.hint


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a\0b", "..", "", "\x1b[2J", "models/../../secret"])
def test_a_name_never_leaves_the_folder(folder: Path, name: str) -> None:
    (folder.parent.parent / "secret.gguf").write_bytes(b"GGUF")
    put(folder, "other.gguf")
    with pytest.raises(LibraryError) as caught:
        library.find_model(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a/b", "a\\b", "C:x", "CON", "con.gguf", "LPT1.txt", "a\0", "a\n", "", ".", "..", ".x", "x.", "x ",
     "a\u202eb", "x" * 300],
)  # fmt: skip
def test_refuses_what_is_no_file_name_somewhere(name: str) -> None:
    with pytest.raises(LibraryError):
        library.safe_filename(name)


def test_takes_ordinary_names() -> None:
    for name in ("Qwen2-0.5B-Instruct-Q4_K_M.gguf", "模型.gguf", "console.gguf", "a b.gguf"):
        assert library.safe_filename(name) == name


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("Qwen2-0.5B", "Qwen2-0.5B-Q4_K_M.gguf"),
        ("模型 1", "模型 1-Q4_K_M.gguf"),
        ("../../x", "x-Q4_K_M.gguf"),
        ("a/b\\c:d\0e\x1b[2Jf", "a-b-c-d-e-2Jf-Q4_K_M.gguf"),
        ("CON", "CON-Q4_K_M.gguf"),
        ("...", "model-Q4_K_M.gguf"),
        ("中" * 300, "中" * 60 + "-Q4_K_M.gguf"),
    ],
)
def test_a_new_model_is_named_after_its_folder(name: str, file: str) -> None:
    assert library.destination(name, "Q4_K_M") == library.models_folder() / file


def test_remembers_what_was_used_and_where_it_came_from(folder: Path) -> None:
    put(folder, "a.gguf", "b.gguf")
    library.remember_used(folder / "a.gguf")
    library.remember_origin(folder / "b.gguf", "owner/name:Q4_K_M", "stamp")
    assert library.last_used() == (folder / "a.gguf").resolve()
    assert library.origin(folder / "b.gguf") == "owner/name:Q4_K_M"
    assert library.find_made_from("owner/name:Q4_K_M", "stamp") == folder / "b.gguf"
    assert library.find_made_from("owner/name:Q4_K_M", "another") is None
    library.remember_alias("Owner/Name:Q4_K_M", folder / "b.gguf")
    assert library.find_alias("owner/name:q4_k_m") == folder / "b.gguf"
    assert library.find_alias("owner/name") is None
    library.remove_model(library.find_model("b"))
    assert library.find_alias("owner/name:q4_k_m") is None
    assert library.find_made_from("owner/name:Q4_K_M", "stamp") is None
    (folder / "a.gguf").unlink()
    assert library.last_used() is None


@pytest.mark.parametrize(
    "text", ["", "[", "[1]", '{"origins": 3, "last_used": 4}', '{"origins": {"../../x": 1}}', "[" * 10**5]
)
def test_a_damaged_state_is_an_empty_one(folder: Path, text: str) -> None:
    (folder.parent / "state.json").write_text(text)
    assert library.last_used() is None
    assert library.find_made_from("x") is None
    put(folder, "a.gguf")
    library.remember_used(folder / "a.gguf")
    assert library.last_used() == (folder / "a.gguf").resolve()


def test_the_state_is_written_whole_or_not_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, "a.gguf")
    library.remember_origin(folder / "a.gguf", "here")
    before = (folder.parent / "state.json").read_text()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OutputError, match="No space left"):
        library.remember_origin(folder / "a.gguf", "there")
    library.remember_used(folder / "a.gguf")  # a convenience: not worth an error
    assert (folder.parent / "state.json").read_text() == before
    assert sorted(p.name for p in folder.parent.iterdir()) == ["models", "state.json"]
