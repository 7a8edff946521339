"""`handmill convert` from the outside: exit codes, what is said and where, and what is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from convert.file_types import FILE_TYPES
from models.gguf_file import read_gguf
from runner.cli.main import main
from scripts.environment import ROOT
from tests.checkpoints import (
    INDEX,
    edit_header,
    edit_json,
    tiny_checkpoint,
    tiny_config,
    tiny_tensors,
    tiny_tokenizer,
    write_json,
    write_shards,
)

COMMAND = [sys.executable, "-m", "runner.cli.main"]
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "tiny")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model.gguf"


def handmill(*args: object, command: list[str] = COMMAND) -> subprocess.CompletedProcess[str]:
    arguments = [*command, *map(str, args)]
    return subprocess.run(arguments, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)


def files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# What it prints


def test_a_report_on_stdout_and_nothing_on_stderr(checkpoint: Path, output: Path) -> None:
    done = handmill("convert", checkpoint, "-o", output, "-t", "q8_0")
    assert (done.returncode, done.stderr) == (0, "")
    *_, summary, path = done.stdout.splitlines()
    assert "Q8_0: 115k weights" in summary
    assert path == str(output)
    assert files(output.parent) == ["model.gguf"]


def test_json_report(checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(checkpoint), "-o", str(output), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["file_type"] == "Q4_K_M"
    assert (report["path"], report["bytes"]) == (str(output), output.stat().st_size)
    assert (report["checked"], report["warnings"]) == (True, [])


def test_dry_run_writes_nothing_and_is_right(
    checkpoint: Path, output: Path, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(checkpoint), "-t", "Q5_K_M", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not own_home.exists()
    assert main(["convert", str(checkpoint), "-t", "Q5_K_M", "-o", str(output), "-q"]) == 0
    assert plan["bytes"] == output.stat().st_size
    written = [(t.name, list(t.shape), t.type, t.nbytes) for t in read_gguf(output).tensors]
    assert [(t["name"], t["shape"], t["type"], t["bytes"]) for t in plan["tensors"]] == written
    assert capsys.readouterr() == ("", "")


def test_the_library_is_where_it_goes_by_default(checkpoint: Path, own_home: Path) -> None:
    assert main(["convert", str(checkpoint), "-q"]) == 0
    assert [path.name for path in own_home.rglob("*.gguf")] == ["tiny-Q4_K_M.gguf"]


def test_types_are_listed_with_their_bits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "-t", "list"]) == 0
    listed = capsys.readouterr().out
    for kind in FILE_TYPES.values():
        assert kind.name in listed
        assert (f"{kind.name:<11} {kind.bits_per_weight:5.2f}" in listed) is not kind.needs_matrix


@pytest.mark.parametrize("args", [["-t", "Q4_X"], ["-j", "0"], ["-j", "many"], []], ids=" ".join)
def test_usage_errors(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    source = ["nowhere"] if args else []
    assert main(["convert", *source, *args]) == 2
    assert capsys.readouterr().err


# Bad input: exit code 1, a message and a hint, nothing left


def config(**fields: object) -> Callable[[Path], Any]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(fields))


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return lambda folder: edit_header(folder / SHARD, change)


def tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        made = tiny_tensors(tiny_config())
        change(made)
        write_shards(folder, made, 2)

    return apply


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return lambda folder: edit_json(folder / "tokenizer.json", change)


def content(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(data)


def cut(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (shutil.rmtree, "no such directory"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config not JSON": (content("config.json", b"{'a': 1}"), "config.json is not JSON"),
    "unknown architecture": (config(architectures=["UnknownForCausalLM"]), "'UnknownForCausalLM' is not supported"),
    "shard missing": (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is named in {INDEX} but is not in"),
    "shard empty": (content(SHARD, b""), f"{SHARD} has 0 bytes"),
    "shard cut short": (cut, f"{SHARD} is cut short"),
    "header too long": (content(SHARD, b"\xff" * 64), "its header says 18,446,744,073,709,551,615 bytes"),
    "unknown dtype": (header(lambda h: h["model.embed_tokens.weight"].update(dtype="F12")), "dtype 'F12' is unknown"),
    "outside the file": (
        header(lambda h: h["model.embed_tokens.weight"].update(data_offsets=[2**50, 2**50 + 40960])),
        f"{SHARD}: its data leaves a hole before it",
    ),
    "another shape": (tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:, :32]})), "lm_head.weight"),
    "index outside": (
        lambda folder: edit_json(
            folder / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": "../../etc/passwd"})
        ),
        "names the shard '../../etc/passwd'",
    ),
    "tensor missing": (tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), "blk.1.ffn_up.weight"),
    "tensor nobody asked for": (tensors(lambda t: t.update(stray=t["model.norm.weight"])), "'stray' in model-0000"),
    "NaN": (tensors(lambda t: t["model.norm.weight"].fill(0x7FC0)), "'model.norm.weight'"),
    "unknown rope": (config(rope_parameters={"rope_type": "ntk"}), "rope scaling 'ntk' is not supported"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
    "tokenizer not JSON": (content("tokenizer.json", b"\x00"), "tokenizer.json is not JSON"),
    "too many tokens": (tokenizer(lambda t: t["model"]["vocab"].update(extra=320)), "ids up to 320"),
    "too few tokens": (
        lambda folder: (
            config(vocab_size=4000)(folder),
            write_shards(folder, tiny_tensors(tiny_config(vocab_size=4000)), 2),
        ),
        "316 tokens for an embedding of 4,000 rows",
    ),
    "escape sequences": (
        tensors(lambda t: t.update({"\x1b]0;owned\x07\u202e" * 99: t["lm_head.weight"]})),
        "no place",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD.keys())
def test_bad_checkpoints(
    damage: Callable[[Path], Any],
    message: str,
    checkpoint: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(checkpoint)
    assert main(["convert", str(checkpoint), "-o", str(output)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    first, *hints = said.err.splitlines()
    assert first.startswith("handmill: ")
    assert message in first
    assert first.isprintable()
    assert "fault of handmill" not in said.err
    assert len(hints) == 1
    assert files(output.parent) == []


def test_no_traceback_from_the_real_command(checkpoint: Path, output: Path) -> None:
    config(architectures=["UnknownForCausalLM"])(checkpoint)
    done = handmill("convert", checkpoint, "-o", output)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Known architectures: " in done.stderr
    assert "LlamaForCausalLM" in done.stderr
    assert "Traceback" not in done.stderr


# The output


def test_an_existing_file_is_kept_unless_forced(
    checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output.write_bytes(b"mine")
    assert main(["convert", str(checkpoint), "-o", str(output)]) == 1
    assert "--force" in capsys.readouterr().err
    assert output.read_bytes() == b"mine"
    assert main(["convert", str(checkpoint), "-o", str(output), "--force", "-q"]) == 0
    assert output.read_bytes()[:4] == b"GGUF"


def test_missing_folder(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(checkpoint), "-o", str(tmp_path / "none" / "x.gguf")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_names_too_long_for_a_file(checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(checkpoint), "-o", str(output.with_name("x" * 300))]) == 1
    assert "fault of handmill" not in capsys.readouterr().err
    assert files(output.parent) == []


def test_read_only_folder(
    checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output.parent.chmod(0o555)
    if os.access(output.parent, os.W_OK):  # root writes everywhere: say what anybody else would be told
        really = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: path != output.parent and really(path, mode))
    assert main(["convert", str(checkpoint), "-o", str(output)]) == 1
    assert f"{output.parent} is not writable" in capsys.readouterr().err
    assert files(output.parent) == []


def on_tmpfs(options: str, folder: Path, *command: str) -> tuple[int, str, list[str]]:
    """Run with a tmpfs mounted at `folder`, in a namespace of its own: exit code, stderr, what is left there."""
    script = 'mount -t tmpfs -o "$0" handmill "$1" || exit 77; f=$1; shift; "$@"; code=$?; ls -A "$f"; exit $code'
    try:
        done = handmill(options, folder, *command, command=["unshare", "-rm", "sh", "-c", script])
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    return done.returncode, done.stderr, done.stdout.split()


def test_read_only_file_system(checkpoint: Path, output: Path) -> None:
    command = [*COMMAND, "convert", str(checkpoint), "-o", str(output)]
    code, said, left = on_tmpfs("ro,size=4m", output.parent, *command)
    assert (code, left) == (1, [])
    assert "is not writable" in said or "Read-only file system" in said


def test_a_disk_that_is_too_small_is_told_at_once(checkpoint: Path, output: Path) -> None:
    command = [*COMMAND, "convert", str(checkpoint), "-t", "F32", "-o", str(output)]
    code, said, left = on_tmpfs("size=256k", output.parent, *command)
    assert (code, left) == (1, [])
    assert "will take" in said
    assert "262 kB free" in said


def test_a_disk_that_fills_up_meanwhile(checkpoint: Path, output: Path) -> None:
    """The room is there when it is looked for, and gone when it is written to."""
    script = (
        "import shutil, sys, types\n"
        "shutil.disk_usage = lambda folder: types.SimpleNamespace(free=1 << 40)\n"
        "from runner.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "convert", str(checkpoint), "-t", "F32", "-o", str(output)]
    code, said, left = on_tmpfs("size=256k", output.parent, *command)
    assert (code, left) == (1, [])
    assert "No space left on device" in said
    assert "The disk is full" in said
    assert "Traceback" not in said


# Interrupted


@pytest.fixture(scope="module")
def slow_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that takes one thread many seconds to encode as IQ3_S."""
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    return tiny_checkpoint(tmp_path_factory.mktemp("slow") / "slow", **sizes)


@contextmanager
def encoding(source: Path, output: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A conversion in the middle of its encoding."""
    arguments = ["convert", str(source), "-t", "IQ3_S", "-j", "1", "-o", str(output), *options]
    # What this process ignores, a child would ignore too: the tests may run under nohup, or in the background.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    try:
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    try:
        deadline = time.monotonic() + 60
        while sum(file.stat().st_blocks * 512 for file in output.parent.iterdir()) < 100_000:  # a header is smaller
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "code"), SIGNALS.items(), ids=lambda value: str(int(value)))
def test_signals_leave_nothing_behind(slow_checkpoint: Path, output: Path, number: int, code: int) -> None:
    with encoding(slow_checkpoint, output) as process:
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in said
    assert files(output.parent) == []


@pytest.mark.parametrize("kind", ["in parts", "from a GGUF", "from a GGUF in parts"])
def test_ctrl_c_leaves_nothing_of_the_other_forms(kind: str, slow_checkpoint: Path, output: Path) -> None:
    source = slow_checkpoint
    if kind.startswith("from a GGUF"):
        source = output.parent.parent / "source.gguf"
        assert main(["convert", str(slow_checkpoint), "-t", "F16", "-o", str(source), "-q"]) == 0
    with encoding(source, output, *(["--split-size", "2M"] if kind.endswith("in parts") else [])) as process:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert files(output.parent) == []


def test_what_a_kill_left_is_removed_by_the_next_run(slow_checkpoint: Path, checkpoint: Path, output: Path) -> None:
    with encoding(slow_checkpoint, output) as process:
        process.kill()
        process.wait()
        assert files(output.parent) == [".model.gguf.partial"]
    assert main(["convert", str(checkpoint), "-o", str(output), "-q"]) == 0
    assert files(output.parent) == ["model.gguf"]


def test_the_second_of_two_runs_is_told(
    slow_checkpoint: Path, checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with encoding(slow_checkpoint, output) as process:
        assert main(["convert", str(checkpoint), "-o", str(output)]) == 1
        assert "another run is writing" in capsys.readouterr().err
        assert process.poll() is None
        assert files(output.parent) == [".model.gguf.partial"]


# The self-check


def test_a_failed_check_leaves_no_file(checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = tiny_tokenizer()
    changed["normalizer"]["normalizers"].insert(0, {"type": "Lowercase"})
    write_json(checkpoint / "tokenizer.json", changed)
    assert main(["convert", str(checkpoint), "-o", str(output)]) == 1
    assert "--no-check" in capsys.readouterr().err
    assert files(output.parent) == []
    assert main(["convert", str(checkpoint), "-o", str(output), "--no-check", "-q"]) == 0
    assert files(output.parent) == ["model.gguf"]


def test_warnings_go_to_stderr(checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_json(checkpoint / "tokenizer_config.json", lambda config: config.pop("chat_template"))
    assert main(["convert", str(checkpoint), "-o", str(output)]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("note: the checkpoint has no chat template")
    assert "note" not in said.out
