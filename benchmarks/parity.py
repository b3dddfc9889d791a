"""Does every strategy train the same model? Real launches of tiny runs, each compared with one process.

    peftune bench parity [--strategies zero2 fsdp2] [--methods full lora] [--tasks causal_lm] [--layouts ...]
                         [--to results.json] [--table table.md]

A cell is a strategy, a method, a task and a layout: a run of six steps through `accelerate launch`, with two processes
where the strategy has several, in float32. It is compared with one process on padded rows in one micro-batch: the loss
and the gradient norm of every step, the evaluation, the weights that were saved, and the logits that the saved folder
gives in plain peft or transformers. A cell that cannot work must be refused before anything is loaded. The cells of a
strategy share one launch (many_runs.py says how), and are as far from each other as in launches of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.deviations import deviations_of
from benchmarks.launches import TRAIN, Run, launched, launched_together
from peftune.config.load import load
from peftune.config.rules import strategy_faults
from peftune.errors import PeftuneError
from peftune.observe.manifest import environment
from peftune.parallel.names import STRATEGIES
from peftune.tasks import TASKS
from peftune.tasks.text import quiet_libraries
from tests import tiny

LORA = {"method": "lora", "r": 4}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter": None, "train": {"learning_rate": 0.001}},
    "lora": {"adapter": LORA},
    "dora": {"adapter": {**LORA, "use_dora": True}},
    "int8+lora": {"adapter": LORA, "model": {"quantization": "int8"}},
    "nf4+lora": {"adapter": LORA, "model": {"quantization": "nf4"}},
}
LAYOUTS: dict[str, list[str]] = {
    "padded, one micro-batch": ["data.layout=padded", "train.tokens_per_micro_batch=100000"],
    "padded, several": ["data.layout=padded", "train.tokens_per_micro_batch=150"],
    "packed, one micro-batch": ["data.layout=packed", "train.tokens_per_micro_batch=100000"],
    "packed, several": ["data.layout=packed", "train.tokens_per_micro_batch=60"],
}
REFERENCE = ("single", "padded, one micro-batch")
TOLERANCES = {"loss": 1e-5, "grad_norm": 1e-4, "metrics": 1e-4, "weights": 1e-4, "logits": 1e-4}
"""Largest deviation of a cell that counts as equal: relative for losses, norms and metrics, absolute for weights and
logits. Ranks sum float32 in another order; where a gradient is near zero, AdamW carries that into the weight by up to
the learning rate (0.003, and 0.001 for all weights)."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination."""

    strategy: str
    method: str
    task: str
    layout: str

    def __str__(self) -> str:
        return f"{self.strategy} / {self.method} / {self.task} / {self.layout}"


@dataclass(frozen=True, slots=True)
class Asked:
    """A run of a cell."""

    cell: Cell
    overrides: tuple[str, ...] = ()
    """RUNS in them stands for the folder of all runs."""
    name: str = ""
    """Of the run folder; empty for the cell's own."""
    script: Path = TRAIN
    environment: tuple[tuple[str, str], ...] = ()
    """Variables that are set for this run alone."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a cell: equal, differs, refused or failed."""

    verdict: str
    deviations: dict[str, float] = field(default_factory=dict)
    why: str = ""
    commit: str = ""


class Bench:
    """A folder of tiny models and rows, and the runs made with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        decoder, encoder = tiny.save_decoder(folder / "decoder"), tiny.save_encoder(folder / "encoder")
        self._tasks = {
            "sequence_classification": self._settings(encoder, tiny.intent_rows(49), 40, max_length=64),
            "token_classification": self._settings(encoder, tiny.tagged_rows(49), 40, max_length=64),
            "question_answering": self._settings(encoder, tiny.question_rows(49, unanswerable=True), 40,
                                                 max_length=48, doc_stride=16),
            "causal_lm": self._settings(decoder, tiny.chat_rows(29), 24, max_length=128),
            "preference": self._settings(decoder, tiny.preference_rows(31), 24, max_length=128),
        }
        self._references: dict[tuple[str, str], Path] = {}

    def _settings(self, model: str, rows: Sequence[Any], train: int, **data: Any) -> dict[str, Any]:
        paths = {}
        for name, part in (("train", rows[:train]), ("validation", rows[train:])):
            path = self.folder / f"{len(list(self.folder.glob('*.jsonl')))}-{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
            paths[name] = str(path)
        return {"model": {"name_or_path": model, "dtype": "float32"}, "data": {**paths, **data},
                "train": {"batch_size": 7, "max_steps": 6, "learning_rate": 0.003},
                "evaluation": {"every_steps": 3, "max_new_tokens": 4}, "checkpoint": {"every_steps": 3},
                "log": {"every_steps": 1, "trackers": []}}

    def config(self, cell: Cell) -> Path:
        """The cell's config file."""
        settings, method = self._tasks[cell.task], METHODS[cell.method]
        path = self.folder / f"{cell.task}-{cell.method}.yaml"
        path.write_text(yaml.safe_dump({
            **settings, "task": cell.task, "adapter": method["adapter"],
            **{section: {**settings[section], **method.get(section, {})} for section in ("model", "train")}}))
        return path

    def run_folder(self, asked: Asked) -> Path:
        """Where a run leaves what it makes."""
        name = asked.name or str(asked.cell).replace(" / ", "-").replace(", ", "-").replace(" ", "-")
        return self.folder / "runs" / name

    def run_alone(self, asked: Asked) -> subprocess.CompletedProcess[str]:
        """Launch a run as a user does; how it ended."""
        run = self._run(asked)
        return launched(asked.cell.strategy, processes_of(asked.cell.strategy), run.arguments, script=run.script,
                        environment=run.environment)

    def run(self, asked: Sequence[Asked]) -> dict[Asked, subprocess.CompletedProcess[str]]:
        """Run these in the order given, in one launch for each strategy; how each ended."""
        ended: dict[Asked, subprocess.CompletedProcess[str]] = {}
        for strategy in dict.fromkeys(one.cell.strategy for one in asked):
            group = [one for one in asked if one.cell.strategy == strategy]
            logs = self.folder / "logs" / f"{len(list(self.folder.glob('logs/*')))}-{strategy}"
            ended |= zip(group, launched_together(strategy, processes_of(strategy), [self._run(one) for one in group],
                                                  logs), strict=True)
        return ended

    def _run(self, asked: Asked) -> Run:
        overrides = [word.replace("RUNS", str(self.folder / "runs")) for word in asked.overrides]
        words = [str(self.config(asked.cell)), f"output_dir={self.run_folder(asked)}", *LAYOUTS[asked.cell.layout]]
        return Run([*words, *overrides], asked.script, dict(asked.environment))

    def outcomes(self, cells: Sequence[Cell]) -> dict[Cell, Outcome]:
        """Run cells, and compare them."""
        refusals = {cell: self.refusal(cell) for cell in cells}
        runnable = [cell for cell in cells if not refusals[cell]]
        self.make_references(runnable)
        ended = self.run([Asked(cell) for cell in runnable])
        return {cell: Outcome("refused", why=refusals[cell]) if refusals[cell]
                else self.outcome(Asked(cell), ended[Asked(cell)]) for cell in cells}

    def outcome(self, asked: Asked, ended: subprocess.CompletedProcess[str]) -> Outcome:
        """Compare a run that has ended."""
        cell = asked.cell
        if ended.returncode != 0:
            return Outcome("failed", why=_said(ended.stderr))
        quantization = METHODS[cell.method].get("model", {}).get("quantization", "none")
        deviations = deviations_of(self.run_folder(asked), self.reference(cell), cell.task, quantization)
        equal = all(value <= TOLERANCES[name] for name, value in deviations.items())
        return Outcome("equal" if equal else "differs", deviations)

    def refusal(self, cell: Cell) -> str:
        """Why a check of the config refuses the cell, if it does."""
        try:
            config = load([str(self.config(cell)), *LAYOUTS[cell.layout]])
        except PeftuneError as error:
            return error.faults[0].message
        return "; ".join(fault.message for fault in strategy_faults(config, cell.strategy))

    def reference(self, cell: Cell) -> Path:
        """The run that a cell is compared with; each is made once."""
        self.make_references([cell])
        return self._references[cell.task, cell.method]

    def make_references(self, cells: Sequence[Cell]) -> None:
        """Run what these cells are compared with, as far as it is not there."""
        missing = {key: Asked(Cell(REFERENCE[0], cell.method, cell.task, REFERENCE[1]),
                              name=f"reference-{cell.task}-{cell.method}")
                   for cell in cells if (key := (cell.task, cell.method)) not in self._references}
        for (key, asked), ended in zip(missing.items(), self.run(list(missing.values())).values(), strict=True):
            assert ended.returncode == 0, ended.stderr
            self._references[key] = self.run_folder(asked)


def processes_of(strategy: str) -> int:
    """How many processes a run of the matrix has."""
    return 1 if strategy == "single" else 2


def _said(stderr: str) -> str:
    """The run's own message, or the end of what it printed."""
    _, mark, message = stderr.partition("error: ")
    return (mark + message)[:2000] if mark else stderr[-2000:]


def table_of(results: Mapping[Cell, Outcome]) -> str:
    """Markdown: a row a strategy and method, a column a task; the largest loss deviation over the layouts."""
    tasks = sorted({cell.task for cell in results})
    lines = [f"| strategy | method | {' | '.join(tasks)} |", "| --- " * (len(tasks) + 2) + "|"]
    for strategy in STRATEGIES:
        for method in METHODS:
            row = [[outcome for cell, outcome in results.items()
                    if (cell.strategy, cell.method, cell.task) == (strategy, method, task)] for task in tasks]
            if any(row):
                lines.append(f"| {strategy} | {method} | {' | '.join(map(_shown, row))} |")
    return "\n".join(lines) + "\n"


def _shown(outcomes: Sequence[Outcome]) -> str:
    bad = [outcome.verdict for outcome in outcomes if outcome.verdict in ("differs", "failed")]
    if bad:
        return f"**{bad[0]}**"
    losses = [outcome.deviations["loss"] for outcome in outcomes if outcome.verdict == "equal"]
    return f"{max(losses):.0e}" if losses else "refused" if outcomes else ""


def main() -> int:
    """Run the cells that are asked for, write what was found after each strategy, and say whether any is red."""
    parser = argparse.ArgumentParser(prog="peftune bench parity", description=__doc__.splitlines()[0])
    tasks = list(TASKS)
    for name, choices in (("strategies", list(STRATEGIES)), ("methods", list(METHODS)), ("tasks", tasks),
                          ("layouts", list(LAYOUTS))):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices, metavar=name[:-1].upper())
    parser.add_argument("--to", type=Path, help="results; cells that are there already and not run now stay")
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    quiet_libraries()
    results = _earlier(asked.to)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("PEFTUNE_CACHE", f"{scratch}/cache")
        bench = Bench(Path(scratch) / "bench")
        commit = environment(torch.device("cpu"))["commit"]
        for strategy in asked.strategies:
            found = bench.outcomes([Cell(strategy, method, task, layout) for method in asked.methods
                                    for task in asked.tasks for layout in asked.layouts])
            results |= {cell: replace(outcome, commit=commit) for cell, outcome in found.items()}
            for cell, outcome in found.items():
                print(f"{outcome.verdict:8} {cell}  {_summary(outcome)}", flush=True)
            _write(asked, results)
    red = [cell for cell, outcome in results.items() if outcome.verdict in ("differs", "failed")]
    print(f"{len(results)} cells, {len(red)} red")
    return 1 if red else 0


def _earlier(path: Path | None) -> dict[Cell, Outcome]:
    if path is None or not path.is_file():
        return {}
    found, keys = json.loads(path.read_text()), ("strategy", "method", "task", "layout")
    return {Cell(*(cell[key] for key in keys)):
            Outcome(**{"commit": found["commit"], **{name: value for name, value in cell.items() if name not in keys}})
            for cell in found["cells"]}


def _summary(outcome: Outcome) -> str:
    return outcome.why or "  ".join(f"{name} {value:.1e}" for name, value in outcome.deviations.items())


def _write(asked: argparse.Namespace, results: Mapping[Cell, Outcome]) -> None:
    if asked.to:
        asked.to.parent.mkdir(parents=True, exist_ok=True)
        asked.to.write_text(json.dumps({
            **environment(torch.device("cpu")), "processes": 2, "tolerances": TOLERANCES, "reference": REFERENCE,
            "largest": {name: max((o.deviations[name] for o in results.values() if o.deviations), default=None)
                        for name in TOLERANCES},
            "cells": [{**asdict(cell), **asdict(outcome)} for cell, outcome in results.items()]}, indent=1) + "\n")
    if asked.table:
        asked.table.parent.mkdir(parents=True, exist_ok=True)
        asked.table.write_text(table_of(results))


if __name__ == "__main__":
    sys.exit(main())
