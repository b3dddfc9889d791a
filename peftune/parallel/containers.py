"""What the containers around this process leave it of the memory that the system has free: Linux's control groups.

Docker, Kubernetes, Slurm and systemd set them, of version 1 or 2 (docs.kernel.org/admin-guide/cgroup-v2.html, and
cgroup-v1/memory.html). The kernel ends a process that exceeds one, without an error that could be read.
"""

from __future__ import annotations

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
    if not own.is_file():
        return None  # not Linux
    found = []
    for line in own.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            found += [_left(folder, *VERSION_2) for folder in _upwards(groups, path)]
        elif "memory" in controllers.split(","):
            found += [_left(folder, *VERSION_1) for folder in _upwards(groups / "memory", path)]
    return min((left for left in found if left is not None), default=None)


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
