"""How much memory this process may still take."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from runner.engine.cgroups import CGROUPS, OWN, control_groups

_NO_LIMIT = 1 << 60
"""Version 1 writes a number near 2^63 where there is no limit."""


def available_memory(
    meminfo: Path = Path("/proc/meminfo"), cgroups: Path = CGROUPS, own: Path = OWN, statm: Path | None = None
) -> int | None:
    """Bytes that can be taken without swapping, within the limits of the control groups and of this process.

    None where nobody says.
    """
    return min(memory_limits(meminfo, cgroups, own, statm).values(), default=None)


def memory_limits(
    meminfo: Path = Path("/proc/meminfo"), cgroups: Path = CGROUPS, own: Path = OWN, statm: Path | None = None
) -> dict[str, int]:
    """Bytes that "machine", "control group" and "process" each leave; what sets no limit is not among them."""
    groups = [size for group in control_groups("memory", cgroups, own) if (size := _control_group(group)) is not None]
    found = {
        "machine": _system(meminfo),
        "control group": min(groups, default=None),
        "process": _address_space(statm or Path("/proc/self/statm")),
    }
    return {name: size for name, size in found.items() if size is not None}


def total_memory() -> int | None:
    """Bytes of memory that the machine has; None where nobody says."""
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _system(meminfo: Path) -> int | None:
    if sys.platform == "linux":
        with suppress(OSError, ValueError, IndexError):
            for line in meminfo.read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return None
    return total_memory()


def _address_space(statm: Path) -> int | None:
    """What `ulimit -v` leaves."""
    with suppress(ImportError):  # not on Windows
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY and (taken := taken_addresses(statm)) is not None:
            return max(0, limit - taken)
    return None


def taken_addresses(statm: Path = Path("/proc/self/statm")) -> int | None:
    """Bytes of addresses that this process has taken; None where nobody says."""
    with suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        return int(statm.read_text().split()[0]) * resource.getpagesize()
    return None


def _control_group(group: Path) -> int | None:
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            most = int((group / limit).read_text())
            if most < _NO_LIMIT:
                return max(0, most - int((group / used).read_text()) + sum(_droppable(group)))
    return None


def _droppable(group: Path) -> Iterator[int]:
    """What counts as used, and is a copy of files that goes when memory is wanted."""
    with suppress(OSError, ValueError, IndexError):
        counts = dict(line.split()[:2] for line in (group / "memory.stat").read_text().splitlines())
        for name in ("active_file", "inactive_file"):
            yield int(counts.get(f"total_{name}") or counts.get(name) or 0)
