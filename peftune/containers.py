"""What the containers around this process leave it of the machine's memory and cores: Linux's control groups.

Docker, Kubernetes, Slurm and systemd set them, of version 1 or 2 (docs.kernel.org/admin-guide/cgroup-v2.html,
cgroup-v1/memory.html, scheduler/sched-bwc.html). The kernel ends a process that exceeds its memory, without an error
that could be read; one that exceeds its share of time is held up, all threads of it at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
"""Files with the limit and what is used of it, and the line of memory.stat with what of that is files' pages that the
kernel gives up first."""


def left_by_containers(groups: Path = GROUPS, own: Path = OWN) -> int | None:
    """Bytes: the least that a group of this process, or one around it, has left; None where no limit is set.

    Args:
        groups: where the groups' files are mounted.
        own: the file that names this process's groups.
    """
    found = (_left(folder, *(VERSION_1 if first else VERSION_2)) for folder, first in _around("memory", groups, own))
    return min((left for left in found if left is not None), default=None)


def cores(groups: Path = GROUPS, own: Path = OWN) -> int:
    """Cores that this process can keep busy: those that it may run on, or the whole ones in the time that a group of it
    is given (docker's --cpus, limits.cpu of Kubernetes), one at least. Arguments as above."""
    may = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # Linux only
    found = (_share(folder, first) for folder, first in _around("cpu", groups, own))
    return max(1, min([may, *(int(share) for share in found if share is not None)]))


def _around(controller: str, groups: Path, own: Path) -> Iterator[tuple[Path, bool]]:
    """Folders of the groups that this process is in, with one controller's files; whether they are of version 1."""
    for line in own.read_text().splitlines() if own.is_file() else ():  # else it is not Linux
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield from ((folder, False) for folder in _upwards(groups, path))
        elif controller in controllers.split(","):
            yield from ((folder, True) for folder in _upwards(groups / controller, path))


def _upwards(mounted: Path, path: str) -> Iterator[Path]:
    """A group's folder and those around it. In a container the path may be the host's, while its own group is mounted
    as the root: then only that is there."""
    folder = mounted / path.lstrip("/")
    yield from (one for one in (folder, *folder.parents) if one.is_relative_to(mounted))


def _left(folder: Path, limit: str, used: str, given_up: str) -> int | None:
    if not (folder / limit).is_file() or (most := (folder / limit).read_text().strip()) == "max":
        return None
    counted = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return max(0, int(most) - int((folder / used).read_text()) + int(counted.get(given_up, 0)))


def _share(folder: Path, first: bool) -> float | None:
    """Cores' time; None where there is no limit."""
    files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if first else ("cpu.max",)
    if not all((folder / name).is_file() for name in files):
        return None
    most, period = " ".join((folder / name).read_text() for name in files).split()
    return None if most in ("max", "-1") else int(most) / int(period)
