"""The weights that a worker keeps on its disk."""

from __future__ import annotations

import os
import time
from pathlib import Path

from runner.worker_cache import forget_what_is_cut, trim_cache


def test_the_cache_keeps_within_its_size_and_holds_whole_files(tmp_path: Path) -> None:
    now = time.time()
    for index, age in enumerate((100, 300, 200, 1)):
        file = tmp_path / f"{index:016x}"
        file.write_bytes(bytes(1000))
        os.utime(file, (now - age, now - age))
    (tmp_path / "notes.txt").write_text("not ours")
    trim_cache(tmp_path, 3500, now)
    assert not (tmp_path / f"{1:016x}").exists()
    (tmp_path / f"{2:016x}").write_bytes(bytes(500))  # cut off by the end of a process
    forget_what_is_cut(tmp_path)
    # the last one was written to just before: nobody knows whether it is whole
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{0:016x}", "index.json", "notes.txt"]
    trim_cache(tmp_path, 0, now)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index.json", "notes.txt"]
