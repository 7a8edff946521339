"""A tokenizer read in a process of its own.

Three things come of that: it is read while the tensors are planned and the first of them encoded; the memory that
it takes (half a gigabyte for some) is given back whole; and a file made to break a parser breaks only that process.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from convert.added_marks import settle_ends
from convert.tokenizer import Vocabulary, read_vocabulary
from models.errors import HandmillError, TokenizerError
from models.text import printable
from models.vocabulary_rules import DEFAULT, VocabularyRules

DEADLINE_SECONDS = 300
"""The largest tokenizers take a few seconds; one that takes longer than this is made to."""
_CHILD = "from convert.reading import answer; answer()"


@contextmanager
def reading_vocabulary(
    path: Path, n_vocab: int, check_texts: Sequence[str], rules: VocabularyRules = DEFAULT
) -> Iterator[Callable[[], Vocabulary]]:
    """Begin `read_vocabulary`; the function given waits for what it returns, or raises what it raises.

    Raises TokenizerError if the process ends without an answer. It does not outlive the block.
    """
    # -P: nothing beside the working directory is imported; what this process imports, the other finds
    command = [sys.executable, "-P", "-c", _CHILD]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(pickle.dumps((path, n_vocab, tuple(check_texts), rules)))
            process.stdin.close()
        deadline = threading.Timer(DEADLINE_SECONDS, process.kill)
        deadline.start()
        try:
            yield lambda: _answer_of(process, path)
        finally:
            deadline.cancel()
            deadline.join()
            process.kill()


def _answer_of(process: subprocess.Popen[bytes], path: Path) -> Vocabulary:
    assert process.stdout is not None
    data = process.stdout.read()
    if process.wait() != 0 or not data:
        raise TokenizerError(
            f"reading the tokenizer in {path} ended its process (exit status {process.returncode})",
            hint=f"The tokenizer is damaged, memory ran out, or it took longer than {DEADLINE_SECONDS} s.",
            path=path,
        )
    answer = pickle.loads(data)  # our own process wrote it
    if isinstance(answer, HandmillError):
        raise answer
    assert isinstance(answer, Vocabulary)
    settle_ends(answer)
    return answer


def answer() -> None:
    """What the other process does: arguments on stdin, a Vocabulary or a HandmillError on stdout."""
    path, n_vocab, check_texts, rules = pickle.load(sys.stdin.buffer)
    result: Vocabulary | HandmillError
    try:
        result = read_vocabulary(path, n_vocab, check_texts, rules)
    except HandmillError as error:
        result = error
    except Exception as error:  # a fault of ours: it must not look like one of the file
        result = TokenizerError(f"reading the tokenizer in {path} failed: {type(error).__name__}: {printable(error)}")
    sys.stdout.buffer.write(pickle.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # nothing is left to clean up, and freeing a large tokenizer takes time
