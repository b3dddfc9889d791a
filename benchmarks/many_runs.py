"""Many runs in one launch: accelerate launch benchmarks/many_runs.py RUNS.json

Importing torch, transformers and DeepSpeed takes longer than a tiny run. So each rank that the launcher has started
imports them once, and then forks a process for one run after another: it runs the script as `accelerate launch` would,
from its first line to its exit code, in a process group that all ranks' forks form anew on a port of their own. The
rank itself never joins a group, starts no thread and loads no model, so nothing of one run can reach the next, and a
run that dies takes no other with it. (One process for all runs would not do: torch 2.13 keeps where the ranks of the
first group met, and those of a second one wait there for ever; DeepSpeed keeps the first group itself.)

RUNS.json is {"limit_s": seconds, "runs": [...]}, and a run {"script": path, "arguments": [...], "environment": {...},
"log": path}. What a rank prints goes to `<log>.<rank>.out` and `.err`, its exit code to `<log>.<rank>.code`: negative,
the number of the signal that ended it.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from peftune.parallel.launcher import free_port
from peftune.parallel.names import launched_kind

LEFT_BEHIND_S = 10.0
"""So long a rank may go on, in seconds, when another one has failed: to fail for the same reason."""
IMPORTED_ONCE = ("peftune.train", "peftune.build", "peftune.loop.finish", "peftune.report.page", "peft")


def run_all(limit_s: float, runs: list[dict[str, Any]]) -> None:
    """Fork a process a run, wait for it, and note its exit code."""
    for name in IMPORTED_ONCE + (("deepspeed",) if launched_kind() == "zero" else ()):
        importlib.import_module(name)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    for run in runs:
        codes = [Path(f"{run['log']}.{other}.code") for other in range(ranks)]
        meeting = Path(f"{run['log']}.port")
        if rank == 0:
            _leave(meeting, free_port())
        port = _awaited(meeting)
        child = os.fork()
        if child == 0:
            _become(run, rank, port)
        _leave(codes[rank], os.waitstatus_to_exitcode(_wait(child, limit_s, codes)))
        for path in codes:  # no rank begins the next run before all have ended this one
            _awaited(path)


def _leave(path: Path, number: int) -> None:
    """Put a number into a file, which is there whole or not at all."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(str(number), encoding="ascii")
    draft.rename(path)


def _awaited(path: Path) -> int:
    """The number that a rank leaves there."""
    while not path.is_file():
        time.sleep(0.005)
    return int(path.read_text(encoding="ascii"))


def _become(run: dict[str, Any], rank: int, port: int) -> NoReturn:
    """Be the script in this process, to its end."""
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False", **run["environment"]}
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        os.dup2(os.open(f"{run['log']}.{rank}.{name}", os.O_WRONLY | os.O_CREAT, 0o644), stream.fileno())
    sys.argv = [run["script"], *run["arguments"]]
    code = 1
    try:
        runpy.run_path(run["script"], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:  # whatever comes, this process never goes on as the rank that it was forked from
        if sys.exception() is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, limit_s: float, codes: list[Path]) -> int:
    """The status of a process at its end, which comes by force if it takes too long or waits for a rank that failed."""
    until = time.monotonic() + limit_s
    left_behind = False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if not left_behind and any(path.is_file() and path.read_text() != "0" for path in codes):
            until, left_behind = min(until, time.monotonic() + LEFT_BEHIND_S), True
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(0.01)


if __name__ == "__main__":
    run_all(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
