"""A training run as users start it: `accelerate launch`, in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from peftune.parallel.launcher import choose_launch

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "peftune" / "train.py"


def launched(
    strategy: str, processes: int, arguments: Sequence[str], *, script: Path = TRAIN,
    environment: Mapping[str, str] | None = None, timeout: float = 600, sequence_ranks: int = 1,
) -> subprocess.CompletedProcess[str]:
    """Launch a run under a strategy, one thread a process, and wait for its end.

    Args:
        strategy: its preset is taken.
        processes: how many.
        arguments: of train.py.
        script: what to launch instead of train.py.
        environment: added to this process's own.
        timeout: seconds.
        sequence_ranks: processes that share each sequence.
    """
    launch = choose_launch(strategy, processes, list(arguments), sequence_ranks=sequence_ranks)
    words = [str(script) if word == str(TRAIN) else word for word in launch.command]
    return subprocess.run([sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *words], cwd=ROOT,
                          capture_output=True, text=True, timeout=timeout, check=False,
                          env={**os.environ, **launch.environment, **(environment or {}), "OMP_NUM_THREADS": "1"})
