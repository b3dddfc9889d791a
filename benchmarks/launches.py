"""A training run as users start it: `accelerate launch`, in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from peftune.parallel.launcher import choose_launch

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "peftune" / "train.py"
MANY_RUNS = ROOT / "benchmarks" / "many_runs.py"
GRACE_S = 5.0
"""How long processes that were told to end may take, in seconds."""


def ended(
    command: Sequence[str], *, timeout: float, grace_s: float = GRACE_S, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, or end it with all processes that it has started.

    They end too where the wait is given up: by Ctrl-C, or by a TERM that tells this process to end.

    Args:
        command: its words.
        timeout: seconds.
        grace_s: between TERM and KILL, in seconds: longer than that of a command which waits in the same way itself.
        options: of Popen.

    Raises:
        subprocess.TimeoutExpired: it was ended. What it has said until then is there.
    """
    with terms_raised(), subprocess.Popen(command, start_new_session=True, text=True, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            _end(process, grace_s)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _end(process: subprocess.Popen[str], grace_s: float) -> None:
    """TERM, and KILL for those that have not ended `grace_s` later, in whatever session they are: a launcher of several
    processes gives each its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGTERM)
        psutil.wait_procs([psutil.Process(process.pid), *below], timeout=grace_s)
        for one in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def terms_raised() -> Iterator[None]:
    """A TERM is an exit within, so that what waits can end what it waits for."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may take signals
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def launched(
    strategy: str, processes: int, arguments: Sequence[str], *, script: Path = TRAIN,
    environment: Mapping[str, str] | None = None, timeout: float = 600, sequence_ranks: int = 1, threads: int = 1,
) -> subprocess.CompletedProcess[str]:
    """Launch a run under a strategy, and wait for its end.

    Args:
        strategy: its preset is taken.
        processes: how many.
        arguments: of train.py.
        script: what to launch instead of train.py.
        environment: added to this process's own.
        timeout: seconds.
        sequence_ranks: processes that share each sequence.
        threads: of each process.
    """
    launch = choose_launch(strategy, processes, list(arguments), sequence_ranks=sequence_ranks)
    words = [str(script) if word == str(TRAIN) else word for word in launch.command]
    return ended([sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *words], cwd=ROOT,
                 timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                 env={**os.environ, **launch.environment, **(environment or {}), "OMP_NUM_THREADS": str(threads)})


@dataclass(frozen=True, slots=True)
class Run:
    """One of several runs that share a launch."""

    arguments: Sequence[str]
    """Of the script."""
    script: Path = TRAIN
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to the launch's own."""


def launched_together(
    strategy: str, processes: int, runs: Sequence[Run], folder: Path, *, limit_s: float = 120
) -> list[subprocess.CompletedProcess[str]]:
    """Launch once, train several runs one after another (see many_runs.py), and say how each ended.

    Args:
        strategy, processes: as for `launched`.
        runs: in this order.
        folder: a new one, for what they print.
        limit_s: a run that takes longer, in seconds, is killed.
    """
    folder.mkdir(parents=True)
    orders = [{**asdict(run), "script": str(run.script), "log": str(folder / str(i))} for i, run in enumerate(runs)]
    (folder / "runs.json").write_text(json.dumps({"limit_s": limit_s, "runs": orders}), encoding="utf-8")
    launch = launched(strategy, processes, [str(folder / "runs.json")], script=MANY_RUNS,
                      timeout=60 + limit_s * len(runs))
    return [_ended(order, processes, launch) for order in orders]


def _ended(
    order: Mapping[str, Any], processes: int, launch: subprocess.CompletedProcess[str]
) -> subprocess.CompletedProcess[str]:
    """All ranks of a run as one process; the launch's own failure where a rank has not come that far."""
    logs = [f"{order['log']}.{rank}" for rank in range(processes)]
    codes = [int(code) if (code := _text(f"{log}.code")) else launch.returncode or 1 for log in logs]
    out, err = ("".join(_text(f"{log}.{name}") for log in logs) for name in ("out", "err"))
    err = err or launch.stderr
    if any(codes) and processes > 1:
        err += f"exit codes of the ranks: {codes}\n"
    return subprocess.CompletedProcess(order["arguments"], next((code for code in codes if code), 0), out, err)


def _text(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""
