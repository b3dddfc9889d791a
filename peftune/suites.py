"""The command `peftune bench`: the suites of the source checkout's benchmarks/."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from peftune.errors import Fault, MachineError

BENCHMARKS = ("throughput", "peers", "gpu", "step", "step_profile", "parity", "memory", "sequences", "quantization",
              "startup", "data_scale", "lora_vs_full", "fuzz", "faults", "resume", "saving", "plan", "plan_budget")
"""Files of benchmarks/."""
DEFAULT = "throughput"


def add_bench(commands: Any) -> None:
    """Add `peftune bench` with its options to the commands."""
    text = "benchmarks: speed beside peers, parity of strategies, memory, start-up, data, scores"
    bench = commands.add_parser("bench", help=text, description=f"{text}. Without a suite: the quick cells of "
                                f"{DEFAULT}")
    bench.set_defaults(command=_bench, takes_overrides=False)
    bench.add_argument("suite", metavar="SUITE", nargs="?", default=DEFAULT, choices=BENCHMARKS,
                       help=f"{' | '.join(BENCHMARKS)}; default: {DEFAULT}")
    bench.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="the suite's options; --help says them")


def _bench(parsed: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / f"{parsed.suite}.py").is_file():
        raise MachineError(Fault(kind="environment", message="the benchmarks lie in the source checkout alone",
                                 mend="clone the repository, then pip install -e . in it"))
    return subprocess.run([sys.executable, "-m", f"benchmarks.{parsed.suite}", *parsed.words], cwd=root,
                          check=False).returncode
