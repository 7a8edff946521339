"""The real client of the hub against a server on loopback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from models import hub, library
from models.errors import HubError
from models.hub_files import HubFile, HubRef
from tests.hub_server import Hub, serve

SHARD = os.urandom(3_500_000)
CHECKPOINT = {
    "config.json": b"{}",
    "tokenizer.json": b"{ }",
    "model-00001-of-00002.safetensors": SHARD,
    "model-00002-of-00002.safetensors": b"second",
    "model.safetensors.index.json": b"{\n}",
    "chat_template.jinja": b"{{ x }}",
    "README.md": b"no",
    "pytorch_model.bin": b"no",
    "pytorch_model.bin.index.json": b"no",
    "consolidated.safetensors": b"no",
    "onnx/model.safetensors": b"no",
    "../../escape/config.json": b"no",
    "model\\..\\x.safetensors": b"no",
}
TORCH_CHECKPOINT = {
    "config.json": b"{}",
    "pytorch_model-00001-of-00002.bin": b"first",
    "pytorch_model-00002-of-00002.bin": b"second",
    "pytorch_model.bin.index.json": b"{ }",
    "training_args.bin": b"no",
    "model.safetensors.index.json": b"no",
    "x/pytorch_model.bin": b"no",
}
NEEDED = {name for name, content in CHECKPOINT.items() if content != b"no"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    quants = {
        "m-Q4_K_M.gguf": b"GGUF four",
        "m-Q8_0-00001-of-00002.gguf": b"GGUF one",
        "m-Q8_0-00002-of-00002.gguf": b"GGUF two",
        "UD/m-UD-Q4_K_XL.gguf": b"GGUF ud",
        "mmproj-m-F16.gguf": b"no",
        "README.md": b"no",
    }
    repos = {
        "kin/check": dict(CHECKPOINT),
        "kin/quants": quants,
        "kin/one": {"small.q5_0.gguf": b"GGUF five"},
        "kin/twice": {"a-Q4_K_M.gguf": b"a", "b-Q4_K_M.gguf": b"b"},
        "kin/evil": {"CON.gguf": b"x", "x/\x1b]0;t\x07-Q8_0.gguf": b"y"},
        "kin/bin": dict(TORCH_CHECKPOINT),
        "kin/pth": {"config.json": b"{}", "consolidated.00.pth": b"no"},
    }
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(Hub(repos)) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("owner/name", HubRef("owner", "name")),
        ("Qwen/Qwen2-0.5B:q8_0", HubRef("Qwen", "Qwen2-0.5B", "Q8_0")),
        ("name", None),
        ("a/b/c", None),
        ("../b", None),
        ("a/..", None),
        ("a/b..c", None),
        ("/a/b", None),
        ("a/b:", None),
        ("a/b:Q4/x", None),
        ("a/b\n", None),
    ],
)
def test_parse_ref(text: str, ref: HubRef | None) -> None:
    assert hub.parse_ref(text) == ref


def test_fetches_what_a_conversion_needs_and_nothing_else(server: Hub) -> None:
    seen: list[tuple[int, int, str]] = []
    folder = hub.fetch_checkpoint(HubRef("kin", "check"), lambda *report: seen.append(report))
    assert folder == library.checkpoints_folder() / "kin--check"
    assert {path.name for path in folder.iterdir()} - {".fetched.json"} == NEEDED
    for name in NEEDED:
        assert (folder / name).read_bytes() == CHECKPOINT[name]
    total = sum(len(CHECKPOINT[name]) for name in NEEDED)
    assert seen[-1][:2] == (total, total)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert list((library.home() / "partial").iterdir()) == []


def test_fetches_again_only_what_changed(server: Hub) -> None:
    folder = hub.fetch_checkpoint(HubRef("kin", "check"))
    server.requests.clear()
    hub.fetch_checkpoint(HubRef("kin", "check"))
    assert server.fetched() == []
    server.repos["kin/check"]["config.json"] = b'{"a": 1}'
    (folder / "tokenizer.json").unlink()
    hub.fetch_checkpoint(HubRef("kin", "check"))
    assert sorted(server.fetched()) == ["config.json", "tokenizer.json"]
    assert (folder / "config.json").read_bytes() == b'{"a": 1}'


def test_what_a_new_commit_lacks_goes(server: Hub) -> None:
    folder = hub.fetch_checkpoint(HubRef("kin", "check"))
    (folder / "mine.txt").write_text("x")
    server.repos["kin/check"] = {"model.safetensors": b"one", "config.json": b"{}"}
    hub.fetch_checkpoint(HubRef("kin", "check"))
    left = {path.name for path in folder.iterdir()} - {".fetched.json"}
    assert left == {"model.safetensors", "config.json", "mine.txt"}
    marker = json.loads((folder / ".fetched.json").read_text())
    assert (set(marker["files"]), marker["complete"]) == ({"model.safetensors", "config.json"}, True)


def test_stopped_while_old_files_go_it_is_not_whole(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.fetch_checkpoint(HubRef("kin", "check"))
    del server.repos["kin/check"]["chat_template.jinja"]

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            hub.fetch_checkpoint(HubRef("kin", "check"))
    assert json.loads((folder / ".fetched.json").read_text())["complete"] is False
    hub.fetch_checkpoint(HubRef("kin", "check"))
    assert not (folder / "chat_template.jinja").exists()


def test_of_two_fetches_at_once_one_waits_until_the_file_is_in_place(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = hub._digest
    second: list[Future[Path]] = []

    def hash_while_another_fetches(path: Path, file: HubFile) -> str:
        if not second:
            second.append(pool.submit(hub.fetch_checkpoint, HubRef("kin", "check")))
            with suppress(TimeoutError):
                second[0].result(timeout=1)
        return real(path, file)

    monkeypatch.setattr(hub, "_digest", hash_while_another_fetches)
    with ThreadPoolExecutor(1) as pool:
        folder = hub.fetch_checkpoint(HubRef("kin", "check"))
        assert second[0].result(timeout=30) == folder
    assert sorted(server.fetched()) == sorted(NEEDED)
    for name in NEEDED:
        assert (folder / name).read_bytes() == CHECKPOINT[name]


def part_sizes() -> list[int]:
    return [path.stat().st_size for path in (library.home() / "partial").iterdir()]


def test_a_stopped_fetch_goes_on_where_it_was(server: Hub) -> None:
    def ctrl_c(done: int, total: int, name: str) -> None:
        if done > 2_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.fetch_checkpoint(HubRef("kin", "check"), ctrl_c)
    (held,) = part_sizes()
    assert 1_000_000 <= held < len(SHARD)
    server.requests.clear()
    seen: list[int] = []
    folder = hub.fetch_checkpoint(HubRef("kin", "check"), lambda done, total, name: seen.append(done))
    ranges = [asked for path, asked in server.requests if path.endswith("model-00001-of-00002.safetensors")]
    assert ranges == [f"bytes={held}-"]
    assert held in seen
    assert (folder / "model-00001-of-00002.safetensors").read_bytes() == SHARD


def test_a_broken_line_is_taken_up_again_by_itself(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.repos["kin/check"] = {"model.safetensors": SHARD, "config.json": b"{}"}
    server.cut_once_after = 2_500_000
    folder = hub.fetch_checkpoint(HubRef("kin", "check"))
    asked = [range_ for path, range_ in server.requests if path.endswith("model.safetensors")]
    assert len(asked) == 2
    assert asked[1] is not None
    assert (folder / "model.safetensors").read_bytes() == SHARD


def test_a_hub_that_ignores_ranges_gives_a_whole_file(server: Hub) -> None:
    server.repos["kin/check"] = {"model.safetensors": SHARD, "config.json": b"{}"}

    def ctrl_c(done: int, total: int, name: str) -> None:
        if done > 2_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.fetch_checkpoint(HubRef("kin", "check"), ctrl_c)
    server.ignore_ranges = True
    folder = hub.fetch_checkpoint(HubRef("kin", "check"))
    assert (folder / "model.safetensors").read_bytes() == SHARD


def test_damaged_content_is_refused_and_not_kept(server: Hub) -> None:
    server.damage = True
    with pytest.raises(HubError, match="hash is wrong"):
        hub.fetch_checkpoint(HubRef("kin", "check"))
    assert part_sizes() == []
    server.damage = False
    folder = hub.fetch_checkpoint(HubRef("kin", "check"))
    assert (folder / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("ref", "files"),
    [
        (HubRef("kin", "quants"), ["m-Q4_K_M.gguf"]),
        (HubRef("kin", "quants", "Q8_0"), ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"]),
        (HubRef("kin", "quants", "UD-Q4_K_XL"), ["m-UD-Q4_K_XL.gguf"]),
        (HubRef("kin", "one"), ["small.q5_0.gguf"]),
    ],
)
def test_fetches_the_gguf_of_the_type(server: Hub, ref: HubRef, files: list[str]) -> None:
    assert hub.fetch(ref).name == files[0]
    assert sorted(path.name for path in library.models_folder().iterdir()) == files
    server.requests.clear()
    assert hub.fetch(ref).name == files[0]
    assert server.fetched() == []


def test_fetch_takes_a_checkpoint_where_there_is_no_gguf(server: Hub) -> None:
    assert hub.fetch(HubRef("kin", "check")).name == "kin--check"


def refuse(ref: HubRef) -> HubError:
    with pytest.raises(HubError) as caught:
        hub.fetch(ref)
    assert str(caught.value).isprintable()
    assert caught.value.hint.isprintable()
    return caught.value


def test_says_which_types_there_are(server: Hub) -> None:
    error = refuse(HubRef("kin", "quants", "Q2_K"))
    assert "no GGUF file of type Q2_K" in str(error)
    assert "Q4_K_M, Q8_0, UD-Q4_K_XL" in error.hint
    assert "2 files of type" in str(refuse(HubRef("kin", "twice")))


def test_names_from_the_hub_stay_names(server: Hub) -> None:
    for file_type in ("?", "Q8_0"):
        assert "names a file that is not taken" in str(refuse(HubRef("kin", "evil", file_type)))
    assert not library.models_folder().exists()


def test_another_file_of_that_name_is_not_overwritten(server: Hub) -> None:
    library.models_folder().mkdir(parents=True)
    mine = library.models_folder() / "m-Q4_K_M.gguf"
    mine.write_bytes(b"mine")
    assert "another m-Q4_K_M.gguf" in str(refuse(HubRef("kin", "quants")))
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        ((404, "RepoNotFound"), "the hub has no kin/check, or it is private"),
        ((401, ""), "the hub has no kin/check, or it is private"),
        ((403, "GatedRepo"), "is gated"),
        ((403, ""), "refuses"),
        ((429, ""), "too many requests"),
        ((500, ""), "error (500)"),
    ],
)
def test_says_what_the_hub_refuses(server: Hub, refusal: tuple[int, str], says: str) -> None:
    server.refuse = refusal
    assert says in str(refuse(HubRef("kin", "check")))


@pytest.mark.parametrize(
    "page", [b"<html>Log in</html>", b"[]", b"{}", b'{"id": "x", "siblings": [{"rfilename": "a"}]}']
)
def test_a_page_in_place_of_a_listing(server: Hub, page: bytes) -> None:
    server.page = page
    refuse(HubRef("kin", "check"))


def test_shards_of_pytorch_are_fetched_where_there_are_no_safetensors(server: Hub) -> None:
    folder = hub.fetch_checkpoint(HubRef("kin", "bin"))
    found = {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.name[0] != "."}
    assert found == {name: content for name, content in TORCH_CHECKPOINT.items() if content != b"no"}


def test_no_shards(server: Hub) -> None:
    assert "has no *.safetensors and no pytorch_model*.bin" in str(refuse(HubRef("kin", "pth")))


def test_no_network_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert "cannot be reached" in str(refuse(HubRef("kin", "check")))


def test_what_was_fetched_whole_does_without_a_network(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.fetch_checkpoint(HubRef("kin", "check"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert hub.fetch_checkpoint(HubRef("kin", "check")) == folder
        (folder / ".fetched.json").write_text('{"complete": false}')
        assert "cannot be reached" in str(refuse(HubRef("kin", "check")))


def test_too_little_room_is_said_before_anything_is_fetched(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(library.home().parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "has 1 kB free" in str(refuse(HubRef("kin", "check")))
    assert server.fetched() == []


def test_a_disk_that_fills_up_meanwhile(server: Hub) -> None:
    def full(done: int, total: int, name: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(HubError, match="the disk is full"):
        hub.fetch_checkpoint(HubRef("kin", "check"), full)
