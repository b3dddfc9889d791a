"""Is a run that goes on the run that never stopped? Every strategy, method, task and layout, bit for bit.

    peftune bench resume [--strategies single zero2] [--methods lora full] [--tasks ...] [--layouts ...]
                         [--to results.json]

A cell is a run of eight steps, with dropout in the model (and in LoRA), which saves at every step. It is killed as its
fifth step begins, and the same command is given again. It is equal if that went on from the checkpoint of the fourth
step, and everything is bit for bit as in the same run left alone: each row of metrics.jsonl but its times, the examples
of each step, the weights in `final` and `best`, the scores, and the checkpoint that was loaded. Cells that are in the
results already are not run again, so a long benchmark can be made in parts. `faults.py` kills at random instants.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import survived
from benchmarks.parity import Asked, Bench, Cell
from benchmarks.recorded_runs import STEPS, recorded
from benchmarks.recorded_train import Kill
from peftune.observe.manifest import environment
from peftune.parallel.names import STRATEGIES
from peftune.tasks import TASKS
from peftune.tasks.text import quiet_libraries

METHODS = ("lora", "full")
LAYOUTS = ("packed, several", "padded, several")
AT_ONCE = 10
"""Cells that share a launch, after which results are written."""


def runs_of(bench: Bench, cell: Cell) -> list[Asked]:
    """The unbroken run, the one that is killed, and what goes on with that."""
    name = str(cell).replace(" / ", "-").replace(", ", "-").replace(" ", "-")
    overrides = ["model.dropout=0.1", *(["adapter.lora_dropout=0.1"] if cell.method == "lora" else [])]
    like = [*overrides, "checkpoint.keep=99"]
    return [recorded(bench, cell, f"{name}-unbroken", like),
            recorded(bench, cell, f"{name}-stopped", like, kill=Kill(at="step", step=STEPS // 2 + 1)),
            recorded(bench, cell, f"{name}-stopped", like, attempt=1)]


def outcomes(bench: Bench, cells: Sequence[Cell]) -> dict[Cell, list[str]]:
    """What differs, by cell; nothing where the runs are equal."""
    asked = {cell: runs_of(bench, cell) for cell in cells}
    ended = bench.run([run for group in asked.values() for run in group])
    found = {}
    for cell, group in asked.items():
        seen = survived(bench, group, ended)
        other = [] if seen.loaded == [STEPS // 2] else [f"went on from {seen.loaded}, not from step {STEPS // 2}"]
        found[cell] = seen.why + other
    return found


def main() -> int:
    """Run the cells that are asked for and not in the results yet, and say whether any is unequal."""
    parser = argparse.ArgumentParser(prog="peftune bench resume", description=__doc__.splitlines()[0])
    for name, choices in (("strategies", STRATEGIES), ("methods", METHODS), ("tasks", TASKS), ("layouts", LAYOUTS)):
        parser.add_argument(f"--{name}", nargs="+", choices=list(choices), default=list(choices), metavar=name.upper())
    parser.add_argument("--to", type=Path, help="results; cells that are there already stay")
    asked = parser.parse_args()
    quiet_libraries()
    results = _earlier(asked.to)
    commit = environment(torch.device("cpu"))["commit"]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("PEFTUNE_CACHE", f"{scratch}/cache")
        bench = Bench(Path(scratch) / "bench")
        for strategy in asked.strategies:
            cells = [Cell(strategy, method, task, layout) for method in asked.methods for task in asked.tasks
                     for layout in asked.layouts]
            missing = [cell for cell in cells if cell not in results]
            for begin in range(0, len(missing), AT_ONCE):
                for cell, why in outcomes(bench, missing[begin : begin + AT_ONCE]).items():
                    results[cell] = {"equal": not why, "why": why, "commit": commit}
                    print("equal  " if not why else "DIFFERS", cell, *why, flush=True)
                _write(asked.to, results)
    unequal = sum(not one["equal"] for one in results.values())
    print(f"{len(results)} cells, {unequal} unequal")
    return 1 if unequal else 0


def _earlier(path: Path | None) -> dict[Cell, dict[str, Any]]:
    if path is None or not path.is_file():
        return {}
    return {Cell(one["strategy"], one["method"], one["task"], one["layout"]):
            {key: one[key] for key in ("equal", "why", "commit")} for one in json.loads(path.read_text())["cells"]}


def _write(path: Path | None, results: Mapping[Cell, dict[str, Any]]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({
        **environment(torch.device("cpu")), "steps": STEPS, "processes": 2, "count": len(results),
        "equal": sum(one["equal"] for one in results.values()),
        "cells": [{**asdict(cell), **one} for cell, one in results.items()]}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
