"""The door to libllama: the log, vocabularies, one forward pass, and files that must not end the process."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest

from models import native
from models.errors import GenerationError, LoadError
from models.native_log import LOG

WARN, ERROR, CONTINUED = 3, 4, 5


@pytest.fixture
def small_gguf(tmp_path: Path) -> Path:
    """A GGUF with metadata and no tensors."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_log_joins_chunks_to_lines() -> None:
    with native.capture_log() as log:
        LOG.write(WARN, b"loading ", None)
        LOG.write(CONTINUED, b"..", None)
        LOG.write(CONTINUED, b". done\nnext\n", None)
        LOG.write(ERROR, b"no newline", None)
    assert log.lines == ["loading ... done", "next", "no newline"]
    assert log.tail(1) == ["no newline"]
    assert log.problems() == ["no newline"]


def test_log_is_bounded_and_ends_with_its_block() -> None:
    with native.capture_log() as log:
        for index in range(10_000):
            LOG.write(WARN, b"line %d\n" % index, None)
    LOG.write(WARN, b"later\n", None)
    assert len(log.lines) < 10_000
    assert log.tail(1) == ["line 9999"]


def test_log_cannot_steer_a_terminal() -> None:
    with native.capture_log() as log:
        LOG.write(WARN, "\x1b]0;owned\x07 \u202e\n".encode(), None)
    assert log.lines[0].isprintable()


def test_log_is_silent_unless_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    LOG.write(WARN, b"quiet\n", None)
    native.set_verbose(True)
    LOG.write(WARN, b"loud\n", None)
    native.set_verbose(False)
    assert capsys.readouterr().err == "loud\n"


def test_vocabulary_tokenizes_and_gives_bytes_back(starter_model: Path) -> None:
    with native.open_vocabulary(starter_model) as vocabulary:
        text = "Hello 请解释 🙂\t x"
        ids = vocabulary.tokenize(text, add_special=True, parse_special=True)
        assert b"".join(vocabulary.piece(token) for token in ids).decode() == text
        assert vocabulary.n_tokens == 49152
        assert (vocabulary.bos, vocabulary.eos, vocabulary.add_bos) == (1, 2, False)


def test_vocabulary_knows_what_is_special(starter_model: Path) -> None:
    with native.open_vocabulary(starter_model) as vocabulary:
        end = vocabulary.special_tokens["<|im_end|>"]
        assert vocabulary.attributes(end) & native.ATTR_CONTROL
        assert vocabulary.is_eog(end)
        assert not vocabulary.attributes(end) & native.ATTR_USER_DEFINED
        assert vocabulary.piece(end) == b""
        assert vocabulary.piece(end, special=True) == b"<|im_end|>"
        assert vocabulary.tokenize("<|im_end|>", add_special=False, parse_special=True) == [end]
        assert end not in vocabulary.tokenize("<|im_end|>", add_special=False, parse_special=False)


def test_vocabulary_refuses_ids_that_would_end_the_process(starter_model: Path) -> None:
    with native.open_vocabulary(starter_model) as vocabulary:
        for token in (-1, 49152, 2**31 - 1):
            with pytest.raises(ValueError, match="outside the vocabulary"):
                vocabulary.piece(token)
            with pytest.raises(ValueError, match="outside the vocabulary"):
                vocabulary.is_eog(token)


def test_vocabulary_takes_any_text(starter_model: Path) -> None:
    with native.open_vocabulary(starter_model) as vocabulary:
        for text in ("", "\0", "a\0b", "\ud800", "a" * 100_000):
            ids = vocabulary.tokenize(text, add_special=False, parse_special=False)
            joined = b"".join(vocabulary.piece(token) for token in ids)
            assert joined == text.encode("utf-8", "replace")


def test_forward_pass_gives_the_logits_of_the_last_token(starter_model: Path) -> None:
    with native.open_vocabulary(starter_model) as vocabulary:
        tokens = vocabulary.tokenize("The capital of France is", add_special=False, parse_special=False)
        logits = native.forward_pass(starter_model, tokens, threads=1)
        assert logits.shape == (vocabulary.n_tokens,)
        assert logits.dtype == np.float32
        assert np.isfinite(logits).all()
        assert vocabulary.piece(int(logits.argmax())) == b" Paris"


def test_forward_pass_says_what_failed(starter_model: Path) -> None:
    with pytest.raises(GenerationError, match="invalid token"):
        native.forward_pass(starter_model, [10**6], threads=1)


def test_broken_files_are_load_errors(starter_model: Path, small_gguf: Path, tmp_path: Path) -> None:
    data = starter_model.read_bytes()
    for name, content in {"empty": b"", "text": b"hello", "cut": data[:3_000_000]}.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(LoadError) as caught:
            native.forward_pass(path, [1], threads=1)
        assert caught.value.facts["log"]
    for path in (small_gguf, tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(LoadError), native.open_vocabulary(path):
            pass


def test_a_model_without_a_vocabulary_is_a_load_error(tmp_path: Path) -> None:
    path = tmp_path / "none.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(4)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LoadError), native.open_vocabulary(path):
        pass


def test_work_runs_in_another_thread_and_its_errors_come_back() -> None:
    assert native.run_interruptibly(threading.current_thread) is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        native.run_interruptibly(lambda: 1 / 0)


def test_interrupting_the_wait_stops_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = threading.Event()

    def work() -> None:
        assert stopped.wait(30)

    real = threading.Thread.join

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        monkeypatch.setattr(threading.Thread, "join", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        native.run_interruptibly(work, stopped.set)
    assert stopped.is_set()


def test_a_missing_library_is_a_load_error() -> None:
    with pytest.raises(LoadError, match="ggml-nothing"):
        native.shared_library("ggml-nothing")


def test_importing_loads_nothing_and_exit_is_silent(starter_model: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from models import native\n"
        "assert 'llama_cpp' not in sys.modules and 'numpy' not in sys.modules\n"
        f"native.load_model(Path({str(starter_model)!r}), native.cpu_model_params())\n"
    )
    root = Path(native.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
