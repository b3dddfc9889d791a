"""What does a strategy save, and what does it cost? Memory and exchange per rank, in real launches of two processes.

    peftune bench memory [--strategies ddp zero2] [--methods full lora] [--to results.json] [--table table.md]

Each cell trains a Llama of 100 million weights, drawn from its config, for a few steps on short rows in float32, so
that weights, gradients and optimizer state are nearly all there is. `measured_train.py` says what is measured.

The processes' glibc is told to map each large block by itself (MALLOC_MMAP_THRESHOLD_): it would raise that bound as
blocks are freed, and keep tens of megabytes of freed tensors in its heap, which the system counts as used.
On CPUs the offload of zero3-offload goes from host memory to host memory: its figures show that nothing is kept twice,
not what it saves on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.launches import launched
from peftune.observe.manifest import environment
from peftune.parallel.host_memory import MAPPING
from peftune.parallel.names import STRATEGIES
from tests import tiny

MEASURED = Path(__file__).resolve().parent / "measured_train.py"
PROCESSES = 2
STEPS = 4
METHODS: dict[str, Any] = {"full": None, "lora": {"method": "lora", "r": 16}}
SIZES = {"hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12, "num_attention_heads": 12,
         "num_key_value_heads": 12, "initializer_range": 0.02}
ALLOCATOR = {MAPPING: str(128 * 1024)}
"""glibc's own first value; giving it stops the raising."""
GIB, MIB = 2**30, 2**20


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination."""

    strategy: str
    method: str

    def __str__(self) -> str:
        return f"{self.strategy} / {self.method}"


@dataclass(frozen=True, slots=True)
class Measured:
    """What the ranks of a cell reported, in rank order; empty where the launch failed."""

    ranks: Sequence[dict[str, Any]] = ()
    why: str = ""

    @property
    def whole_bytes(self) -> int:
        """Highest resident memory of a process, from its start to its last checkpoint, of the rank that has most."""
        return max(max(peaks["before_steps"], *peaks["steps"], peaks["checkpoint"]) for peaks in self._peaks)

    @property
    def steps_bytes(self) -> int:
        """The same within steps."""
        return max(max(peaks["steps"]) for peaks in self._peaks)

    @property
    def _peaks(self) -> list[dict[str, Any]]:
        return [rank["peak_bytes"] for rank in self.ranks]

    @property
    def handed_bytes(self) -> dict[str, int]:
        """What a rank hands in during a step, by kind: the last step, since the first one also checks itself."""
        last = [rank["handed_bytes"][-1] for rank in self.ranks]
        kinds = sorted({kind for step in last for kind in step})
        return {kind: max(step.get(kind, 0) for step in last) for kind in kinds}


class Bench:
    """A folder with the model and the rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny.save_decoder(folder / "decoder", **SIZES)
        self.rows = folder / "train.jsonl"
        self.rows.write_text("".join(
            json.dumps({"prompt": f"question {i} about the {noun}?", "completion": f" the {noun} works again"}) + "\n"
            for i, noun in enumerate(tiny.NOUNS * 2)))

    def config(self, cell: Cell) -> Path:
        """The cell's config file: one short row a rank and step, kept whole in memory, saved once."""
        path = self.folder / f"{cell.method}.yaml"
        path.write_text(yaml.safe_dump({
            "task": "causal_lm", "adapter": METHODS[cell.method],
            "model": {"name_or_path": self.model, "dtype": "float32", "gradient_checkpointing": False},
            "data": {"train": str(self.rows), "validation": None, "max_length": 64, "layout": "padded"},
            "train": {"batch_size": PROCESSES, "max_steps": STEPS, "tokens_per_micro_batch": 64},
            "checkpoint": {"every_steps": STEPS}, "log": {"every_steps": STEPS, "trackers": []}}))
        return path

    def measure(self, cell: Cell) -> Measured:
        """Launch a cell and read what its ranks wrote."""
        folder = self.folder / "run"
        try:
            done = launched(cell.strategy, PROCESSES, [str(self.config(cell)), f"output_dir={folder}"],
                            script=MEASURED, environment=ALLOCATOR, timeout=900)
            if done.returncode != 0:
                return Measured(why=done.stderr[-3000:])
            ranks = [json.loads((folder / f"memory-{rank}.json").read_text()) for rank in range(PROCESSES)]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        assert all(rank["strategy"] == cell.strategy for rank in ranks), "another strategy ran than was asked for"
        return Measured(ranks)


def table_of(results: Mapping[Cell, Measured]) -> str:
    """Markdown: a row a cell; memory of the rank that has most."""
    lines = ["| strategy | method | peak RSS, whole process (GiB) | peak RSS, steps (GiB) | handed in per step (MiB) |",
             "| --- | --- | ---: | ---: | --- |"]
    for cell, measured in results.items():
        if measured.why:
            lines.append(f"| {cell.strategy} | {cell.method} | **failed** | | |")
            continue
        kinds = [f"{kind} {count / MIB:,.1f}" for kind, count in measured.handed_bytes.items()
                 if count >= 0.05 * MIB]
        lines.append(f"| {cell.strategy} | {cell.method} | {measured.whole_bytes / GIB:.2f} | "
                     f"{measured.steps_bytes / GIB:.2f} | {', '.join(kinds)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the cells that are asked for, write what was found after each, and say whether any failed."""
    parser = argparse.ArgumentParser(prog="peftune bench memory", description=__doc__.splitlines()[0])
    strategies = [name for name in STRATEGIES if name != "single"]
    for name, choices in (("strategies", strategies), ("methods", list(METHODS))):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices, metavar=name[:-1].upper())
    parser.add_argument("--to", type=Path)
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    results: dict[Cell, Measured] = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("PEFTUNE_CACHE", f"{scratch}/cache")
        bench = Bench(Path(scratch))
        for cell in (Cell(strategy, method) for method in asked.methods for strategy in asked.strategies):
            results[cell] = bench.measure(cell)
            print(results[cell].why or table_of({cell: results[cell]}).splitlines()[-1], flush=True)
            _write(asked, results)
    return 1 if any(measured.why for measured in results.values()) else 0


def _write(asked: argparse.Namespace, results: Mapping[Cell, Measured]) -> None:
    for path in (asked.to, asked.table):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    if asked.to:
        asked.to.write_text(json.dumps({
            **environment(torch.device("cpu")), "processes": PROCESSES, "steps": STEPS, "sizes": SIZES,
            "methods": METHODS, "allocator": ALLOCATOR, "runs": 1,
            "cells": [{**asdict(cell), "ranks": measured.ranks, "why": measured.why} | (
                {} if measured.why else {"whole_bytes": measured.whole_bytes, "steps_bytes": measured.steps_bytes,
                                         "handed_bytes": measured.handed_bytes})
                for cell, measured in results.items()]}, indent=1) + "\n")
    if asked.table:
        asked.table.write_text(table_of(results))


if __name__ == "__main__":
    sys.exit(main())
