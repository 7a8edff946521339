"""The control groups that this process is in, whose limits are what it really has of a machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def control_groups(controller: str, folder: Path = CGROUPS, own: Path = OWN) -> Iterator[Path]:
    """The folders of this process's group for `controller` ("cpu", "memory") and of those above it, nearest first.

    Of version 1 (a tree for each controller) and of version 2 (one tree). Limits of all of them hold. A container
    may see its own group as the root: a folder that is not there limits nothing.
    """
    try:
        entries = own.read_text().splitlines()
    except OSError:
        return
    for entry in entries:
        _, controllers, path = [*entry.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        root = folder / controllers if controllers else folder
        inside = Path(path.lstrip("/"))
        for level in (inside, *inside.parents):
            yield root / level
