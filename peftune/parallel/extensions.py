"""Kernels that DeepSpeed compiles at its first use, and what an interrupted compilation leaves behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from peftune.errors import Fault, MachineError

SILENT_S = 15 * 60
"""A build in whose folder nothing has changed for so long, in seconds, is taken for dead."""


def refuse_abandoned_builds() -> None:
    """Say which lock a killed build has left: torch waits for its release for ever, and so would every rank.

    Raises:
        MachineError: there is such a lock.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]  # with and without a folder for the version of Python
    abandoned = [lock for lock in locks if time.time() - _last_change(lock.parent) > SILENT_S]
    if abandoned:
        raise MachineError([Fault(
            kind="environment", file=str(lock), mend=f"rm {lock}",
            message="a compilation of DeepSpeed's kernels was interrupted and left its lock, on which this run would "
                    "wait for ever") for lock in abandoned])


def _last_change(folder: Path) -> float:
    """Seconds since the epoch of the newest file; now, if they vanish while they are looked at."""
    try:
        return max(path.stat().st_mtime for path in folder.iterdir())
    except FileNotFoundError:
        return time.time()
