"""How much memory this process may still take."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be taken without swapping, within the control group's limit; None where nobody says."""
    found = [size for size in (_system(meminfo), _control_group(cgroups)) if size is not None]
    return min(found, default=None)


def _system(meminfo: Path) -> int | None:
    if sys.platform == "linux":
        try:
            for line in meminfo.read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        except (OSError, ValueError, IndexError):
            return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _control_group(folder: Path) -> int | None:
    try:
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):  # "max" is no number: no limit
        return None
