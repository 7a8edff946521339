"""How long a conversion takes, and how much memory, beside llama.cpp's own two steps.

    python -m benchmarks.convert [--case qwen2|llama|experts] [--rounds N] [--folder FOLDER]

Both sides read the same checkpoint from a warm cache, in turns, in one run; what is compared is the medians. Memory is
the peak of the private memory (RssAnon) of a side's processes taken together, sampled fifty times a second, so Linux
only. `qwen2` has rows of 896 over 8 shards and compares with convert_hf_to_gguf.py and llama-quantize together;
`llama` has wide rows, `experts` many small matrices that become few: both compare with llama-quantize alone, on a
GGUF converted before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoints import make_experts, make_llama, make_qwen2
from scripts.environment import ROOT
from tests.peer import converter_command, missing_peer, peer_convert, quantizer_command

_TYPE = "Q4_K_M"


@dataclass(frozen=True)
class Cost:
    seconds: float
    megabytes: float


@dataclass(frozen=True)
class Side:
    """One way to the quantized file. The files it made are deleted after each round."""

    name: str
    commands: Sequence[Sequence[str]]
    made: Sequence[Path]


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.convert", description="Time conversions beside llama.cpp's.")
    parser.add_argument("--case", choices=list(_CASES), action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench", help="for the checkpoints; kept")
    parser.add_argument("--peer-only", action="store_true", help="measure llama.cpp's side alone")
    args = parser.parse_args()
    if missing := missing_peer():
        print(missing, file=sys.stderr)
        return 1
    for case in args.case or _CASES:
        maker, sides = _CASES[case]
        checkpoint = args.folder / case
        if not (checkpoint / "made").exists():
            print(f"Making {checkpoint} ...", file=sys.stderr)
            maker(checkpoint)
            (checkpoint / "made").touch()
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            ours, theirs = sides(checkpoint, Path(folder))
            compare(case, [theirs] if args.peer_only else [ours, theirs], args.rounds)
    return 0


def _qwen2_sides(checkpoint: Path, folder: Path) -> tuple[Side, Side]:
    between, out = folder / "between.gguf", folder / "peer.gguf"
    commands = [converter_command(checkpoint, between), quantizer_command(between, out, _TYPE)]
    return _our_side(checkpoint, folder), Side("convert_hf_to_gguf.py, llama-quantize", commands, [between, out])


def _quantize_sides(checkpoint: Path, folder: Path) -> tuple[Side, Side]:
    between, out = folder / "between.gguf", folder / "peer.gguf"
    peer_convert(checkpoint, between)
    return _our_side(checkpoint, folder), Side("llama-quantize", [quantizer_command(between, out, _TYPE)], [out])


def _our_side(checkpoint: Path, folder: Path) -> Side:
    out = folder / "ours.gguf"
    handmill = Path(sys.executable).with_name("handmill")
    command = [str(handmill), "convert", str(checkpoint), "-o", str(out), "-t", _TYPE, "--force"]
    return Side("handmill convert", [command], [out])


_Maker = Callable[[Path], None]
_Sides = Callable[[Path, Path], tuple[Side, Side]]
_CASES: dict[str, tuple[_Maker, _Sides]] = {
    "qwen2": (make_qwen2, _qwen2_sides),
    "llama": (make_llama, _quantize_sides),
    "experts": (make_experts, _quantize_sides),
}


def compare(case: str, sides: Sequence[Side], rounds: int) -> None:
    """Run the sides in turns, and print each round, the medians and their ratio."""
    print(f"{case}, {_TYPE}, {len(os.sched_getaffinity(0))} cores, {rounds} rounds")
    costs: dict[str, list[Cost]] = {side.name: [] for side in sides}
    for number in range(rounds + 1):
        for side in sides:
            cost = _measure(side)
            if number:  # the first round fills the cache, and does not count
                costs[side.name].append(cost)
                print(f"  round {number}  {side.name:40} {cost.seconds:7.2f} s {cost.megabytes:7.0f} MB", flush=True)
    medians = [statistics.median(cost.seconds for cost in costs[side.name]) for side in sides]
    for side, median in zip(sides, medians, strict=True):
        peak = max(cost.megabytes for cost in costs[side.name])
        print(f"  median   {side.name:40} {median:7.2f} s {peak:7.0f} MB at the peak")
    if len(sides) > 1:
        print(f"  ratio    {medians[0] / medians[1]:.2f}")


def _measure(side: Side) -> Cost:
    os.sync()  # what one side wrote must not be written out in the other's time
    peak = 0.0
    started = time.monotonic()
    for command in side.commands:
        peak = max(peak, _run(command))
    cost = Cost(time.monotonic() - started, peak)
    for path in side.made:
        path.unlink()
    return cost


def _run(command: Sequence[str]) -> float:
    """Run a command to its end; the peak of its processes' private memory, in megabytes."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    peak = 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        ended = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(0.02):
                peak = max(peak, sum(map(_private_kilobytes, _family(process.pid))))

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        ended.set()
        watcher.join()
        if code:
            said.seek(0)
            raise RuntimeError(f"exit code {code}: {' '.join(command)}\n{said.read()[-3000:]}")
    return peak / 1024


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found, queue = [], [pid]
    while queue:
        found.append(pid := queue.pop())
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                queue += map(int, children.read_text().split())
            except OSError:
                continue
    return found


def _private_kilobytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


if __name__ == "__main__":
    sys.exit(main())
