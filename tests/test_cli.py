"""The command line: what goes where, and which exit code. A scripted engine, or the starter model as a process."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from models import library
from models.errors import GenerationError, HandmillError, LoadError
from runner.cli import main as cli
from runner.cli.options import gpu_layers, integer, number, size
from runner.engine.protocol import LoadOptions
from tests.fake_engine import FakeEngine
from tests.hub_server import Hub, serve

ROOT = Path(__file__).parent.parent
CODE = "import sys; from runner.cli.main import console; sys.exit(console())"
Stdin = Callable[..., None]


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def stdin(monkeypatch: pytest.MonkeyPatch) -> Stdin:
    """Nothing is piped in, unless a test says so."""

    def pipe(text: str, terminal: bool = False) -> None:
        monkeypatch.setattr(sys, "stdin", Tty(text) if terminal else io.StringIO(text))

    pipe("")
    return pipe


@pytest.fixture
def model(starter_model: Path) -> str:
    library.models_folder().mkdir(parents=True)
    (library.models_folder() / "Smol-Q4_1.gguf").symlink_to(starter_model)
    return "Smol-Q4_1"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, model: str) -> FakeEngine:
    fake = FakeEngine("Guten Tag \x1b[31m🌾")
    fake.loaded_with = []  # type: ignore[attr-defined]

    def load(path: Path, options: LoadOptions, progress: object = None) -> FakeEngine:
        fake.loaded_with.append((path, options))  # type: ignore[attr-defined]
        return fake

    monkeypatch.setattr("runner.engine.start.load_as_told", load)
    return fake


def complaint(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    assert cli.main(argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


# run


def test_run_writes_the_reply_as_it_is_and_nothing_else(
    engine: FakeEngine, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", model, "Good", "day"]) == 0
    assert capsys.readouterr() == ("Guten Tag \x1b[31m🌾", "")
    assert engine.chats[0][-1].content == "Good day"
    assert engine.closed


def test_run_filters_for_a_terminal_and_tells_statistics_there(
    engine: FakeEngine, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = Tty(), Tty()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert cli.main(["run", model, "Hi"]) == 0
    assert out.getvalue() == "Guten Tag 🌾\n"
    assert "tok/s" in err.getvalue()
    err.truncate(0)
    assert cli.main(["run", "-q", model, "Hi"]) == 0
    assert "tok/s" not in err.getvalue()


def test_run_json_has_the_documented_fields(
    engine: FakeEngine, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--json", model, "Hi", "--max-tokens", "5"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == [
        "text",
        "thought",
        "finish_reason",
        "prompt_tokens",
        "cached_tokens",
        "generated_tokens",
        "thought_tokens",
        "drafted_tokens",
        "accepted_tokens",
        "load_seconds",
        "prefill_seconds",
        "generate_seconds",
        "gpu_layers",
        "device",
    ]
    assert (facts["text"], facts["finish_reason"], facts["generated_tokens"]) == ("Guten", "length", 5)


@pytest.mark.parametrize("argv", [["run", "--json", "", "x"], ["chat", "--json", ""], ["list", "--json"]])
def test_json_to_a_terminal_holds_nothing_that_it_obeys(
    engine: FakeEngine, model: str, stdin: Stdin, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    said = "中\x1b[2J\x9b2J\x9d0;t\x9c\x7f\u202e\u2066🌾"
    engine.replies = [(*said,)]
    (library.models_folder() / f"{model}.gguf").rename(odd := library.models_folder() / f"{said}.gguf")
    for out in (Tty(), io.StringIO()):
        stdin('{"content": "x"}')
        monkeypatch.setattr(sys, "stdout", out)
        assert cli.main([word or str(odd) for word in argv]) == 0
        last = json.loads(out.getvalue().splitlines()[-1])
        assert said in (last.get("text"), last.get("name"))
        assert out.getvalue().replace("\n", "").isprintable() or not out.isatty()
        assert ("中" in out.getvalue()) != out.isatty()


def test_show_json_to_a_terminal_is_ascii(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (library.models_folder() / f"{model}.gguf").rename(odd := library.models_folder() / "\x7f\x9b2J.gguf")
    monkeypatch.setattr(sys, "stdout", out := Tty())
    assert cli.main(["show", "--json", str(odd)]) == 0
    assert out.getvalue().strip().isprintable()
    assert json.loads(out.getvalue())["path"] == str(odd)


def test_run_appends_what_is_piped_in(engine: FakeEngine, model: str, stdin: Stdin) -> None:
    stdin("the text\n")
    cli.main(["run", model, "Sum", "up:"])
    stdin("only this\n")
    cli.main(["run", model])
    assert [chat[-1].content for chat in engine.chats] == ["Sum up:\n\nthe text", "only this"]


def test_run_takes_options_between_the_words(engine: FakeEngine, model: str) -> None:
    assert cli.main(["run", model, "--seed", "7", "two", "words", "--temperature", "0"]) == 0
    assert engine.chats[0][-1].content == "two words"
    assert (engine.samplings[0].seed, engine.samplings[0].temperature) == (7, 0)
    assert engine.samplings[0].top_k == engine.default_sampling.top_k


def test_run_passes_on_system_and_load_options(engine: FakeEngine, model: str) -> None:
    argv = ["run", model, "x", "--system", "S", "-c", "512", "-g", "all", "--vram", "1.5G", "-j", "3", "-v"]
    assert cli.main(argv) == 0
    assert [m.content for m in engine.chats[0]] == ["S", "x"]
    ((path, options),) = engine.loaded_with  # type: ignore[attr-defined]
    assert path.name == "Smol-Q4_1.gguf"
    assert options == LoadOptions(context=512, gpu_layers="all", vram=3 << 29, threads=3, verbose=True)


def test_run_continues_the_text_of_a_base_model(
    engine: FakeEngine, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine._chat_template = False
    assert cli.main(["run", model, "Once", "--system", "S", "--think", "off", "--think-budget", "5"]) == 0
    assert engine.prompts == [engine.encode_text("Once")]
    notes = capsys.readouterr().err
    assert all(f"{option} is left out" in notes for option in ("--system", "--think", "--think-budget"))


def test_run_without_a_prompt_is_a_usage_error(
    engine: FakeEngine, model: str, stdin: Stdin, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin("", terminal=True)
    assert "there is no prompt" in complaint(capsys, 2, "run", model)


def test_notes_go_to_stderr(engine: FakeEngine, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    object.__setattr__(engine.info, "notes", ("CPU only \x1b[2J",))
    cli.main(["run", model, "x"])
    assert capsys.readouterr().err == "note: CPU only \\x1b[2J\n"
    cli.main(["run", "-q", model, "x"])
    assert capsys.readouterr().err == ""


# chat


def test_chat_answers_lines(engine: FakeEngine, model: str, stdin: Stdin, capsys: pytest.CaptureFixture[str]) -> None:
    stdin("Hello\nAgain\n")
    assert cli.main(["chat", model]) == 0
    assert capsys.readouterr().out == "Guten Tag \x1b[31m🌾\n" * 2


def test_chat_refuses_a_base_model(engine: FakeEngine, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine._chat_template = False
    err = complaint(capsys, 1, "chat", model)
    assert "base model" in err
    assert "handmill run" in err


# Errors and exit codes


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (LoadError("it does not load", hint="Buy memory."), 1, "handmill: it does not load\n  Buy memory.\n"),
        (GenerationError("jammed"), 1, "handmill: jammed\n"),
        (KeyboardInterrupt(), 130, "handmill: stopped by Ctrl-C\n"),
        (cli.Terminated(15), 143, "handmill: stopped by SIGTERM\n"),
        (RuntimeError("odd \x1b[2J"), 1, "unexpected RuntimeError: odd \\x1b[2J"),
    ],
)
def test_every_failure_has_its_exit_code(
    engine: FakeEngine,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    says: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(engine, "generate", fail)
    err = complaint(capsys, code, "run", model, "x")
    assert err.startswith(says) if says.startswith("handmill") else says in err
    assert engine.closed
    monkeypatch.setenv("HANDMILL_DEBUG", "1")
    if isinstance(error, Exception):
        with pytest.raises(type(error)):
            cli.main(["run", model, "x"])


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["run"],
        ["run", "m", "x", "--bogus"],
        ["list", "x"],
        ["run", "m", "x", "--tem", "0"],
        ["run", "m", "x", "-c", "0"],
        ["run", "m", "x", "--top-p", "1.5"],
        ["run", "m", "x", "--temperature", "nan"],
        ["run", "m", "x", "-g", "some"],
        ["run", "m", "x", "--vram", "lots"],
    ],
)
def test_usage_errors_are_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "usage: handmill" in complaint(capsys, 2, *argv)


def test_parsers_of_options() -> None:
    assert [size(t) for t in ("6G", "6GiB", "512m", "1.5k", "7")] == [6 << 30, 6 << 30, 512 << 20, 1536, 7]
    assert [gpu_layers(t) for t in ("auto", "all", "0", "12")] == ["auto", "all", 0, 12]
    assert integer(0, 5)("5") == 5
    assert number(0, 1)("0.5") == 0.5


def test_bad_models_are_named_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.gguf").write_bytes(b"<html>")
    (tmp_path / "empty").mkdir()
    for path, says in (
        (tmp_path / "no.gguf", "HTML"),
        (tmp_path / "missing" / "x.gguf", "does not exist"),
        (tmp_path / "empty", "config.json"),
    ):
        assert says in complaint(capsys, 1, "run", str(path), "x")
    assert "no model 'nothing'" in complaint(capsys, 1, "run", "nothing", "x")
    assert "\\x1b" in complaint(capsys, 1, "run", "\x1b[2J", "x")


# The library


def test_list_show_and_rm(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    (library.models_folder() / "bad.gguf").write_bytes(b"junk")
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert "Smol-Q4_1  Q4_1" in out
    assert "damaged" in out
    assert cli.main(["list", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["name"], row.get("file_type"), row["last_used"]) for row in rows] == [
        ("bad", None, False),
        ("Smol-Q4_1", "Q4_1", False),
    ]
    assert cli.main(["rm", "bad"]) == 0
    assert "Removed bad" in capsys.readouterr().out
    assert "no model 'bad'" in complaint(capsys, 1, "rm", "bad")


def test_list_tells_of_a_missing_part(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    part = library.models_folder() / "big-00001-of-00003.gguf"
    part.write_bytes((library.models_folder() / f"{model}.gguf").read_bytes())
    assert cli.main(["list"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("big "))
    assert "damaged" in row
    assert cli.main(["list", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert next(row for row in rows if row["name"] == "big")["error"] == "2 of its parts are missing"


def test_list_of_an_empty_library_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert "handmill pull" in complaint(capsys, 0, "list")


def test_show_tells_what_the_file_holds(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", model]) == 0
    out = capsys.readouterr().out
    assert "135M parameters" in out
    assert "marks turns with special tokens" in out
    assert "<|im_start|>" in out
    assert cli.main(["show", model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["plain_text_turns"] is False
    assert facts["tensors"]["Q4_1"]["count"] == 210
    assert facts["metadata"]["tokenizer.ggml.tokens"] == 49152
    assert facts["context_length"] == 8192


def test_no_model_means_the_last_used(engine: FakeEngine, model: str, stdin: Stdin) -> None:
    assert cli.main(["run", model, "x"]) == 0
    stdin("hi\n")
    assert cli.main(["chat"]) == 0
    paths = [path for path, _ in engine.loaded_with]  # type: ignore[attr-defined]
    assert paths[0].resolve() == paths[1].resolve()


def test_no_model_and_none_used_says_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "handmill pull starter" in complaint(capsys, 1, "chat")


def test_a_hub_reference_is_fetched_once_and_then_found_here(
    engine: FakeEngine, starter_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repos = {"kin/smol": {"smol-Q4_1.gguf": starter_model.read_bytes()}}
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(Hub(repos)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert cli.main(["pull", "kin/smol", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["kind"], facts["bytes"]) == ("gguf", starter_model.stat().st_size)
        assert "no nothing/here, or it is private (and there is no file or directory" in complaint(
            capsys, 1, "run", "nothing/here", "x"
        )
    assert cli.main(["run", "kin/smol", "x"]) == 0  # the hub is gone
    assert engine.loaded_with[-1][0].name == "smol-Q4_1.gguf"  # type: ignore[attr-defined]
    capsys.readouterr()
    assert "cannot be reached" in complaint(capsys, 1, "pull", "kin/smol")
    assert "is no hub reference" in complaint(capsys, 2, "pull", "smol")


# As a process


def handmill(*argv: str, **kwargs: object) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-c", CODE, *argv, "-j", "1"],  # more threads wait for one another on a busy machine
        cwd=ROOT,
        **{"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe, **kwargs},
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from runner.cli.main import main; main(['--help']); "
        "heavy = {'numpy', 'llama_cpp', 'huggingface_hub', 'gguf', 'prompt_toolkit', 'rich', 'jinja2', 'tokenizers'}; "
        "sys.exit(f'imported: {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for name, module in cli.command_modules():
        assert f"    {name} " in done.stdout
        assert module.HELP in done.stdout


def test_sigterm_ends_cleanly_in_the_middle_of_a_reply(model: str) -> None:
    process = handmill("run", model, "Write a long story.", "--temperature", "0", "-q")
    assert process.stdout is not None
    assert process.stdout.read(4)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, b"handmill: stopped by SIGTERM\n")


def test_ctrl_c_ends_with_130(model: str) -> None:
    process = handmill("run", model, "Write a long story.", "--temperature", "0", "-q")
    assert process.stdout is not None
    assert process.stdout.read(4)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"handmill: stopped by Ctrl-C\n")


def test_a_reader_that_stops_reading_is_no_error(model: str) -> None:
    process = handmill("run", model, "Write a long story.", "--temperature", "0", "-q", "--max-tokens", "400")
    assert process.stdout is not None
    assert process.stdout.read(4)
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), err) == (0, b"")


def test_a_console_of_a_narrow_encoding_gets_everything(model: str) -> None:
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    process = handmill("run", model, "-q", "--max-tokens", "1", stdin=subprocess.PIPE, env=env)
    _, err = process.communicate("说：你好 🌾".encode() + b"\xff\n", timeout=60)
    assert (process.returncode, err) == (0, b"")


def test_every_named_error_has_an_exit_code_of_1_or_2() -> None:
    pending = [HandmillError]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        assert kind.exit_code in (1, 2)
