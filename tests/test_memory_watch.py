"""Memory that runs out while a model is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runner.engine.memory_watch import NEAR_ZERO, MemoryWatch

MB = 1 << 20


class Machine:
    """Devices whose memory the test sets, and a clock that it moves."""

    def __init__(self, **free: int | None) -> None:
        self.free = free
        self.now = 0.0

    def watch(self, *used: str) -> MemoryWatch:
        return MemoryWatch(used, self.free.get, lambda: self.now)

    def after(self, seconds: float, **free: int) -> None:
        self.now += seconds
        self.free |= free


def test_it_warns_once_of_each_device() -> None:
    machine = Machine(CUDA0=2000 * MB, CPU=4000 * MB)
    watch = machine.watch("CUDA0")
    assert watch.look() == ""
    machine.after(1, CUDA0=NEAR_ZERO - 1)
    assert watch.look() == ""  # not at every token
    machine.after(10)
    assert "CUDA0" in (said := watch.look())
    assert "--reserve" in said
    machine.after(10, CPU=5 * MB)
    said = watch.look()
    assert said.startswith("only 5")
    assert "--context" in said
    machine.after(10)
    assert watch.look() == ""


@pytest.mark.parametrize("at_first", [0, 100 * MB, None])
def test_what_loading_itself_used_up_is_no_news(at_first: int | None) -> None:
    machine = Machine(CUDA0=at_first, CPU=None)
    watch = machine.watch("CUDA0")
    machine.after(10)
    assert watch.look() == ""
    machine.after(10, CUDA0=(at_first or 0) * 3 // 4)
    assert watch.look() == ""


FILLED = """
import mmap, resource, sys
from pathlib import Path
from runner.engine import local, memory_watch
from runner.engine.memory import available_memory
from runner.engine.protocol import LoadOptions, Message, Sampling

memory_watch._SECONDS = 0.0
with local.load(Path(sys.argv[1]), LoadOptions(context=256, gpu_layers=0, cache=0)) as engine:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    chunks = engine.chat([Message("user", "Count to fifty.")], Sampling(temperature=0, max_tokens=20))
    for number, chunk in enumerate(chunks):
        if number == 5:  # another program would not be within this limit, but is seen in the same way
            resource.setrlimit(resource.RLIMIT_AS, (taken + (40 << 20), resource.RLIM_INFINITY))
        if chunk.notice:
            print(number, chunk.notice)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on addresses is counted on Linux")
def test_a_reply_tells_of_it(starter_model: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", FILLED, str(starter_model)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(said) == 1
    number, notice = said[0].split(" ", 1)
    assert int(number) in (6, 7)
    assert "of memory are free" in notice
