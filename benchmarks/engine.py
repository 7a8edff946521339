"""What the engine costs beside llama.cpp's own tools, in turns, in one run, with the starter model or another.

    python -m benchmarks.engine [--case speed|first|draft|restore|apart] [--rounds N] [--model FILE] [-g N]

`speed`: `handmill bench` beside llama-bench: 512 tokens of prompt, 128 generated; with layers on a GPU llama-bench
runs on this installation's own libraries of llama.cpp. `first`: from the start of the process to the first byte of the
reply, beside llama-completion with the very same prompt. `draft`: a page of code repeated, and free text: plain, with
lookup, and by llama-lookup. `restore`: 4,000 tokens computed, and taken from disk by the next process. `apart`: the
engine in a process of its own, where it is with a GPU, beside one in this process, both on the CPU. Compared are
medians, and the median of the ratios of a round: these hold where a machine is noisy.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from models.native import library_folders, open_vocabulary
from models.starter import fetch_starter
from runner import LoadOptions, Message, Sampling, load
from runner.engine import local
from runner.engine.protocol import Engine
from runner.engine.supervised import SupervisedEngine
from runner.engine.threads import default_threads
from scripts.build_peer import BINARIES, peer_folder

_CODE = "\n".join((Path(__file__).parent.parent / "runner/engine/memory.py").read_text("utf-8").splitlines()[:45])
_REPEAT = f"Repeat this Python code exactly as it is, with no change:\n```python\n{_CODE}\n```"
_FREE = "Write a story about a miller who finds a letter in a sack of flour. Be inventive, and never repeat yourself."
_QUESTION = "Name three rivers."
Rates = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.engine", description="Time the engine beside llama.cpp's tools.")
    parser.add_argument("--case", choices=list(_CASES), action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", type=Path)
    parser.add_argument("-g", "--gpu-layers", default="0", help="of `speed`: layers on the GPU in both tools (0)")
    args = parser.parse_args()
    model = args.model or fetch_starter()
    for case in args.case or _CASES:
        print(f"{case}, {model.name}, {default_threads()} threads, {args.rounds} rounds", flush=True)
        _CASES[case](model, args.rounds, *([args.gpu_layers] if case == "speed" else []))
    return 0


def _compare(rounds: int, ours: Callable[[], Rates], theirs: Callable[[], Rates], *, than: str) -> None:
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    for name in pairs[0][0]:
        mine, other = ([pair[i][name] for pair in pairs] for i in (0, 1))
        ratio = statistics.median(m / o for m, o in zip(mine, other, strict=True))
        medians = f"{statistics.median(mine):9.2f} {than} {statistics.median(other):9.2f}"
        print(f"  {name:<8} {medians}   median ratio of a round {ratio:.3f}", flush=True)


def _speed(model: Path, rounds: int, layers: str) -> None:
    threads = str(default_threads())

    def ours() -> Rates:
        command = [*_handmill("bench", model), "-r", "2", "-d", "0", "-q", "--json", "-j", threads, "-g", layers]
        lines = [json.loads(line) for line in _output(command).splitlines()]
        return {line["test"]: line["tokens_per_second"] for line in lines}

    def theirs() -> Rates:
        command = [_tool("llama-bench"), "-m", str(model), "-p", "512", "-n", "128", "-t", threads]
        command += ["-r", "2", "-fa", "auto", "-o", "jsonl", "-ngl", "999" if layers == "all" else layers]
        lines = [json.loads(line) for line in _output(command, own_libraries=layers != "0").splitlines()]
        return {
            f"pp{line['n_prompt']}" if line["n_prompt"] else f"tg{line['n_gen']}": line["avg_ts"] for line in lines
        }

    _compare(rounds, ours, theirs, than="tok/s, llama-bench")


def _first(model: Path, rounds: int) -> None:
    with load(model, LoadOptions(cache=0)) as engine:
        tokens = engine.encode_chat([Message("user", _QUESTION)])
    text = _text(model, tokens)
    ours = [*_handmill("run", model), _QUESTION, "-q", "--cache", "off", "--temperature", "0", "--max-tokens", "8"]
    theirs = [_tool("llama-completion"), "-m", str(model), "-p", text, "-n", "8", "--temp", "0"]
    theirs += ["-t", str(default_threads()), "-no-cnv", "--no-display-prompt", "--special"]
    pairs = [(_first_byte(ours), _first_byte(theirs)) for _ in range(rounds)]
    mine, other = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    over = statistics.median(m - o for m, o in pairs)
    print(f"  {mine:.3f} s, llama-completion {other:.3f} s, {len(tokens)} tokens   median difference {over:.3f} s")


def _draft(model: Path, rounds: int) -> None:
    n = 300
    greedy = Sampling(temperature=0.0, max_tokens=n)
    rates: dict[str, dict[str, list[float]]] = {}
    with (
        load(model, LoadOptions(cache=0, speculate=False)) as plain,
        load(model, LoadOptions(cache=0)) as drafting,
        tempfile.TemporaryDirectory() as folder,
    ):
        command = [_tool("llama-lookup"), "-m", str(model), "-n", str(n), "--temp", "0"]
        command += ["-t", str(default_threads()), "-c", "2048"]
        for text, question in (("code repeated", _REPEAT), ("free text", _FREE)):
            tokens = plain.encode_chat([Message("user", question)])
            prompt = Path(folder, "prompt.txt")
            prompt.write_text(_text(model, tokens), encoding="utf-8")
            found = rates[text] = {"plain": [], "lookup": [], "llama-lookup": []}
            for _ in range(rounds):
                for name, engine in (("plain", plain), ("lookup", drafting)):
                    found[name].append(list(engine.generate(tokens, greedy))[-1].stats.tokens_per_second)
                said = re.search(r"decoded .* speed:\s*([\d.]+)", _output([*command, "-f", str(prompt)], both=True))
                found["llama-lookup"].append(float(said[1]) if said else float("nan"))
    for text, found in rates.items():
        for name, values in found.items():
            ratio = statistics.median(v / p for v, p in zip(values, found["plain"], strict=True))
            print(f"  {text:<14} {name:<13} {statistics.median(values):7.1f} tok/s   {ratio:.2f} of plain", flush=True)


def _restore(model: Path, rounds: int) -> None:
    code = "".join(path.read_text("utf-8") for path in sorted((Path(__file__).parent.parent / "models").glob("*.py")))
    seconds: list[list[float]] = [[], []]
    one = Sampling(temperature=0.0, max_tokens=1)
    for _ in range(min(rounds, 3)):
        with tempfile.TemporaryDirectory() as home:
            os.environ["HANDMILL_HOME"] = home
            for kept in seconds:
                with load(model) as engine:
                    last = list(engine.generate(engine.encode_text(code)[:4000], one))[-1]
                kept.append(last.stats.prefill_seconds)
    computed, restored = (statistics.median(values) for values in seconds)
    print(f"  computed {computed:.2f} s, restored {restored:.3f} s   1/{computed / restored:.0f}")


_REPLY = """
import sys
from pathlib import Path
from runner import LoadOptions, Message, Sampling
from runner.engine.{module} import {make}

with {make}(Path(sys.argv[1]), LoadOptions(context=2048, gpu_layers=0, cache=0)) as engine:
    for chunk in engine.chat([Message("user", sys.argv[2])], Sampling(temperature=0.0, max_tokens=8)):
        print(chunk.text, end="", flush=True)
"""


def _apart(model: Path, rounds: int) -> None:
    code = [_REPLY.format(module=module, make=make) for module, make in _ENGINES]
    commands = [[sys.executable, "-c", text, str(model), _QUESTION] for text in code]
    pairs = [[_first_byte(command) for command in commands] for _ in range(rounds)]
    here, apart = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    over = statistics.median(b - a for a, b in pairs)
    print(f"  first    {apart:.3f} s, in this process {here:.3f} s   median difference {over:.3f} s", flush=True)
    options = LoadOptions(context=2048, gpu_layers=0, cache=0, speculate=False)
    long = Sampling(temperature=0.0, max_tokens=200)
    with local.load(model, options) as inside, SupervisedEngine(model, options) as outside:

        def rate(engine: Engine) -> Rates:
            return {"tg200": list(engine.chat([Message("user", _FREE)], long))[-1].stats.tokens_per_second}

        _compare(rounds, lambda: rate(outside), lambda: rate(inside), than="tok/s, in this process")


_ENGINES = (("local", "load"), ("supervised", "SupervisedEngine"))


def _text(model: Path, tokens: Sequence[int]) -> str:
    """What a tool of llama.cpp has to be given for these tokens."""
    with open_vocabulary(model) as vocabulary:
        return b"".join(vocabulary.piece(token, special=True) for token in tokens).decode()


def _handmill(command: str, model: Path) -> list[str]:
    return [sys.executable, "-m", "runner.cli.main", command, str(model)]


def _tool(name: str) -> str:
    path = peer_folder() / BINARIES / name
    if not path.exists():
        sys.exit(f"no {path}; build it: python -m scripts.build_peer {name}")
    return str(path)


def _output(command: Sequence[str], *, both: bool = False, own_libraries: bool = False) -> str:
    stderr = subprocess.STDOUT if both else subprocess.DEVNULL
    folder = str(library_folders()[0]) if own_libraries else ""
    environment = os.environ | ({"LD_LIBRARY_PATH": folder, "DYLD_LIBRARY_PATH": folder} if folder else {})
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, check=True
    )
    return done.stdout.decode("utf-8", "replace")


def _first_byte(command: Sequence[str]) -> float:
    """Seconds from the start of a process to the first byte that it writes to stdout."""
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.stdout.read()
    if process.returncode:  # a tool that did not start is quick
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return seconds


_CASES: dict[str, Callable[..., None]] = {
    "speed": _speed,
    "first": _first,
    "draft": _draft,
    "restore": _restore,
    "apart": _apart,
}

if __name__ == "__main__":
    sys.exit(main())
