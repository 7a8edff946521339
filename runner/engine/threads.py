"""How many threads to compute with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from runner.engine.cgroups import CGROUPS, OWN, control_groups

_CPUS = Path("/sys/devices/system/cpu")


def default_threads() -> int:
    """The physical cores that this process may run on, and no more than its share of processor time.

    A second thread on a core that is already busy multiplying matrices only gets in the way. Where the system
    does not say which processors share a core, each counts as one.
    """
    cores = _physical_cores(_allowed_processors())
    quota = _quota()
    return max(1, min(cores, int(quota)) if quota is not None else cores)


def _allowed_processors() -> set[int]:
    if sys.platform == "linux":
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _physical_cores(processors: set[int], folder: Path = _CPUS) -> int:
    cores = set()
    for processor in processors:
        try:
            siblings = (folder / f"cpu{processor}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            siblings = str(processor)
        cores.add(siblings)
    return len(cores)


def _quota(folder: Path = CGROUPS, own: Path = OWN) -> float | None:
    """Processors' worth of time that the control groups above this process allow, the least of them; or None."""
    shares = [_share(group) for group in control_groups("cpu", folder, own)]
    return min((share for share in shares if share is not None), default=None)


def _share(group: Path) -> float | None:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number: no limit
        return None
