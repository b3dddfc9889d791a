"""What a process may take of host memory, and what it holds of it beside its tensors, by its allocator."""

from __future__ import annotations

import contextlib
import ctypes.util
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from peftune.containers import left_by_containers
from peftune.errors import Fault, MachineError

LIMIT = "PEFTUNE_MEMORY_BYTES"
"""Environment variable: bytes of host memory that one process may take in all, for shared machines."""
PRELOAD = "LD_PRELOAD"
TCMALLOCS = ("tcmalloc_minimal", "tcmalloc")
USUAL_SLACK: Mapping[str, float] = {"glibc": 0.6, "tcmalloc": 0.1, "glibc, mapping": 0.05}
MOST_SLACK: Mapping[str, float] = {"glibc": 2.6, "tcmalloc": 0.12, "glibc, mapping": 0.05}
"""By allocator: of what comes and goes in a step, as much is held on top of it, mostly and as a precaution;
measured by `peftune bench plan_budget`. glibc may hold more still where nothing gives free memory back: its memalign
cannot put a block where an equal one was freed, only where there is more."""
MAPPING = "MALLOC_MMAP_THRESHOLD_"
"""glibc's variable: a block from that size on is mapped by itself, and given back when freed, which costs time."""


def unused_bytes(processes: int) -> int:
    """Of what the machine and the containers around this process have free, the share of one of so many processes."""
    available, contained = psutil.virtual_memory().available, left_by_containers()
    return (available if contained is None else min(available, contained)) // processes


def free_bytes(processes: int) -> int:
    """What this process may still take of its share of unused memory and, if that is less, of PEFTUNE_MEMORY_BYTES.

    Args:
        processes: that share the machine, this one among them.

    Raises:
        MachineError: PEFTUNE_MEMORY_BYTES is no number.
    """
    unused, limit = unused_bytes(processes), limit_bytes()
    return unused if limit is None else min(unused, limit - psutil.Process().memory_info().rss)


def given_back_bytes() -> int:
    """What this process has held more than it does now, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(0, peak - psutil.Process().memory_info().rss)


def limit_bytes() -> int | None:
    """PEFTUNE_MEMORY_BYTES; None where it is not set. Raises MachineError where it is no number."""
    given = os.environ.get(LIMIT)
    if given is None:
        return None
    if not given.isdecimal():
        raise MachineError(Fault(kind="environment", message=f"{LIMIT}={given}: no number of bytes",
                                 mend=f"write it out, as {LIMIT}=8000000000"))
    return int(given)


def preload() -> dict[str, str]:
    """The variable that gives a process tcmalloc, where that is installed and nothing else is wished for."""
    if sys.platform != "linux" or {PRELOAD, MAPPING} & os.environ.keys():
        return {}
    found = next(filter(None, map(ctypes.util.find_library, TCMALLOCS)), None)
    return {PRELOAD: found} if found else {}


def return_free_memory(kind: str) -> None:
    """Give the system back what the allocator holds and nothing uses, between parts of a run that need other blocks:
    their peaks would add up. `kind`: of the device; only on CPUs does it matter."""
    if kind == "cpu" and sys.platform == "linux":
        library = ctypes.CDLL(None)
        with contextlib.suppress(AttributeError):  # musl has no such function
            if allocator() == "tcmalloc":
                library.MallocExtension_ReleaseFreeMemory()
            else:
                library.malloc_trim(0)


def allocator() -> str:
    """Who hands out this process's memory: a key of MOST_SLACK."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text() if maps.exists() else ""
    if "tcmalloc" in loaded:
        return "tcmalloc"
    return "glibc, mapping" if MAPPING in os.environ else "glibc"
