"""How fast the true loop trains: tokens a second, steps, memory, and the share of what the device can multiply.

    peftune bench throughput [quick | shapes | scaling | overhead | allocator | frozen | sizes | products | gpu]
                             [--rows instructions.jsonl] [--repeats 3] [--only CELL ...]
                             [--to results.json] [--table table.md] [--against results.json --at-least 0.9]

Each cell is `accelerate launch` of the loop that users run (timed_train.py), on a model drawn from its config. Cells
take turns: every repeat runs each of them once. The device's ceiling, products of square bfloat16 matrices, is measured
before each run with as many threads. `--against` exits with 1 if a ratio fell below `--at-least` of the earlier one.

Results are written after each run. A cell that fails is written down with its last lines, the others go on, and the
exit code is 1. A file that --to names and that exists is gone on with: only cells that lack a result are measured.

The suites stand in speed_cells.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.arithmetic import WARM_UP, fallen, rates, spread
from benchmarks.launches import launched, terms_raised
from benchmarks.speed_cells import SUITES, Cell
from benchmarks.subjects import SHAPES, instruction_rows, save_config, save_model, save_rows, token_rows, work_flops
from benchmarks.turns import Kept, gather, kept_in, write
from benchmarks.twins import allocators_of, devices_of, overhead_of, products_of, reuse_of, sizes_of
from peftune.observe.manifest import environment
from peftune.parallel.host_memory import PRELOAD, preload

TIMED = Path(__file__).resolve().parent / "timed_train.py"
GIB = 2**30
LONGEST = max(cell.max_length for suite in SUITES.values() for cell in suite)
VALIDATION_ROWS = 24
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""A Llama's linear layers by name, as peft wants them where only some layers are adapted."""


class Bench:
    """A folder with models and rows; how many cores there are."""

    def __init__(self, folder: Path, rows: Path | None) -> None:
        self.folder, self.rows, self.threads = folder, rows, psutil.cpu_count(logical=False) or 1
        self._models: dict[str, str] = {}

    def config(self, cell: Cell) -> Path:
        """Of the cell: constant rate, scored and saved at its end alone."""
        name = str(cell).replace(" ", "-").replace(",", "")
        rows = instruction_rows(self.rows, cell.rows + VALIDATION_ROWS)
        if cell.full_rows:
            rows = [{"prompt": "Go on:", "completion": " " + " ".join(row["completion"] for row in _turned(rows, i))}
                    for i in range(len(rows))]
        if cell.shape not in self._models:  # one for all lengths: a large model takes much disk
            self._models[cell.shape] = save_model(self.folder / cell.shape, SHAPES[cell.shape],
                                                  instruction_rows(self.rows, 2000), LONGEST)
        return save_config(self.folder / f"{name}.yaml", {
            "task": "causal_lm", "output_dir": str(self.folder / name),
            "adapter": _adapter(cell),
            "model": {"name_or_path": self._models[cell.shape], "dtype": cell.dtype,
                      "gradient_checkpointing": cell.recompute, "quantization": cell.quantization,
                      "reuse_frozen_layers": cell.reuse, **({"compile": "parts"} if cell.parts else {})},
            "data": {"train": save_rows(self.folder / f"{name}.jsonl", rows[VALIDATION_ROWS:]),
                     "validation": save_rows(self.folder / "validation.jsonl", rows[:VALIDATION_ROWS]),
                     "max_length": cell.max_length},
            "train": {"batch_size": cell.batch_size, "tokens_per_micro_batch": cell.micro_batch_tokens,
                      "num_epochs": cell.epochs, "lr_scheduler": "constant", "warmup_ratio": 0.0},
            "evaluation": {"max_new_tokens": 0, "every_steps": 10_000},
            "checkpoint": {"every_steps": 10_000}, "log": {"trackers": []}})

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Launch the cell; what its ranks and its summary say. Counts are of all ranks, memory of the largest."""
        config = self.config(cell)
        run = Path(str(config).removesuffix(".yaml")) / str(time.time_ns())
        record = ours(config, run, processes=cell.processes, threads=max(1, self.threads // cell.processes),
                      tcmalloc=cell.tcmalloc, switches=cell.switches)
        if cell.last_layers:
            return record  # the formula is of models whose layers all train
        flops = work_flops(token_rows(config, "train"), SHAPES[cell.shape],
                           record["trainable_parameters"] if cell.rank else 0, config)
        record["flops_per_token"] = flops / sum(record["tokens"])
        return record


def _adapter(cell: Cell) -> dict[str, Any] | None:
    if cell.rank is None:
        return None
    found: dict[str, Any] = {"r": cell.rank, "lora_alpha": 2 * cell.rank}
    if cell.last_layers:
        layers = SHAPES[cell.shape].layers
        found |= {"layers_to_transform": list(range(layers - cell.last_layers, layers)), "target_modules": LINEAR}
    return found


def _turned(rows: Sequence[dict[str, str]], start: int) -> Iterator[dict[str, str]]:
    """All rows in turn, beginning with one of them."""
    yield from rows[start:]
    yield from rows[:start]


def ours(
    config: Path, run: Path, *, processes: int, threads: int, tcmalloc: bool, switches: Mapping[str, str],
) -> dict[str, Any]:
    """Launch the loop with a config; the record of its steps.

    Args:
        config: the config file.
        run: a new run folder, which is removed again.
        processes: under DDP if there are several.
        threads: of each.
        tcmalloc: preloaded; else glibc hands out memory.
        switches: of timed_train.py, see `Cell.switches`.
    """
    assert preload() or not tcmalloc, "tcmalloc is not installed: apt install libtcmalloc-minimal4"
    variables = {"BENCH_STARTED": str(time.time()), **switches, **(preload() if tcmalloc else {PRELOAD: ""})}
    try:
        done = launched("single" if processes == 1 else "ddp", processes, [str(config), f"output_dir={run}"],
                        script=TIMED, threads=threads, environment=variables)
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-2900:]}"
        ranks = [json.loads((run / f"timing-{rank}.json").read_text()) for rank in range(processes)]
        assert ranks[0]["ranks"] == processes, "another number of processes ran than was asked for"
        record = ranks[0] | {"total_tokens": [sum(step) for step in zip(*(rank["total_tokens"] for rank in ranks))],
                             "steps_bytes": max(rank["steps_bytes"] for rank in ranks)}
        if "BENCH_BARE" not in switches:
            summary = json.loads((run / "summary.json").read_text())
            record["evaluation_loss"] = summary["metrics"]["validation"]["loss"]
        return record
    finally:
        shutil.rmtree(run, ignore_errors=True)  # weights and states of several runs would fill a disk


def summary_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Spreads over the repeats of what `rates` says, of memory, start-up, evaluation and saving."""
    found: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for name, value in rates(record).items():
            found[name].append(value)
        for name in ("first_step_s", "steps_bytes", "evaluation_loss", "peak_allocated_bytes", "peak_reserved_bytes"):
            if record.get(name) is not None:
                found[name].append(record[name])
        if record.get("step_seconds"):
            found["training_s"].append(record["first_step_s"] + sum(record["step_seconds"][1:]))
        if record.get("evaluation_seconds"):
            found["evaluation_tokens_per_second"].append(record["evaluation_tokens"][-1]
                                                         / record["evaluation_seconds"][-1])
        if record.get("checkpoint_seconds"):
            found["checkpoint_s"].append(record["checkpoint_seconds"][-1])
        for name in ("ceiling_flops", "stolen_share"):
            if name in record:
                found[name].append(record[name])
        if "flops_per_token" in record:
            found["of_ceiling"].append(found["tokens_per_second_of_middle_step"][-1] * record["flops_per_token"]
                                       / record["ceiling_flops"])
    return {name: spread(values) for name, values in found.items()}


def table_of(summaries: Mapping[str, Mapping[str, Any]], failures: Iterable[str] = ()) -> str:
    """Markdown: a row a cell; medians, and the range of the middle step's tokens a second."""
    lines = ["| cell | tokens/s, middle step (range) | supervised/s | samples/s | step p50 / p95 (s) | padding | "
             "of the ceiling | peak memory in steps (GiB) | first step (s) |", "| --- |" + " ---: |" * 8]
    for name, found in summaries.items():
        middle = {key: value["median"] for key, value in found.items()}
        rate = found["tokens_per_second_of_middle_step"]
        share = f"{middle['of_ceiling']:.1%}" if "of_ceiling" in middle else ""
        lines.append(
            f"| {name} | {rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f}) | "
            f"{middle['supervised_tokens_per_second']:,.0f} | {middle['samples_per_second']:.2f} | "
            f"{middle['step_p50_s']:.2f} / {middle['step_p95_s']:.2f} | {middle['padding_share']:.1%} | {share} | "
            f"{middle.get('peak_allocated_bytes', middle['steps_bytes']) / GIB:.2f} | {middle['first_step_s']:.1f} |")
    lines += [f"| {name} | **failed** |" + " |" * 7 for name in failures]
    return "\n".join(lines) + "\n"


def publish(asked: argparse.Namespace, outcome: Mapping[str, Any], table: str) -> int:
    """Print and write what was found; 1 where a contestant failed, or a ratio fell against earlier results."""
    print(table + "\n" + "\n".join(f"{name}: {value:.3g}" for name, value in outcome["ratios"].items()))
    save(asked, outcome, table)
    if outcome.get("failures"):
        print(f"failed: {'; '.join(outcome['failures'])}", file=sys.stderr)
        return 1
    if asked.against is None:
        return 0
    lower = fallen(outcome["ratios"], json.loads(asked.against.read_text())["ratios"], asked.at_least)
    for line in lower:
        print(f"fell: {line}", file=sys.stderr)
    return 1 if lower else 0


def save(asked: argparse.Namespace, outcome: Mapping[str, Any], table: str) -> None:
    """Write what was found until now."""
    write(asked.to, json.dumps(outcome, indent=1) + "\n")
    write(asked.table, table)


def options(parser: argparse.ArgumentParser, repeats: int) -> None:
    """What the suites of speed have in common."""
    parser.add_argument("--rows", type=Path, help='JSON lines of {"instruction", "input", "output"}; default: made up')
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--against", type=Path, help="earlier results: exit 1 where a ratio fell")
    parser.add_argument("--at-least", type=float, default=0.9, help="of the earlier ratio; default 0.9")


def outcome_of(suite: str, kept: Kept, setting: Mapping[str, Any]) -> dict[str, Any]:
    """All that is known of a suite's cells, for the results file."""
    cells = {str(cell): cell for cell in SUITES[suite]}
    records = {name: kept.records[name] for name in cells if kept.records.get(name)}
    summaries = {name: summary_of(found) for name, found in records.items()}
    ratios = {f"{name}: share of the ceiling": found["of_ceiling"]["median"] for name, found in summaries.items()
              if "of_ceiling" in found}
    measured = {name: cells[name] for name in records}
    compared, added = overhead_of(measured, summaries)
    ratios |= compared | allocators_of(measured, summaries) | reuse_of(measured, summaries)
    ratios |= products_of(measured, summaries) | sizes_of(measured, summaries) | devices_of(measured, summaries)
    return {**setting, "warm_up_steps": WARM_UP,
            "cells": {name: asdict(cell) for name, cell in cells.items() if name in {**records, **kept.failures}},
            "failures": kept.failures, "ratios": ratios, "added_milliseconds": added, "summaries": summaries,
            "records": records}


def main() -> int:
    """Measure a suite, and write what was found."""
    parser = argparse.ArgumentParser(prog="peftune bench throughput", description=__doc__.splitlines()[0])
    parser.add_argument("suite", nargs="?", choices=list(SUITES), default="quick")
    options(parser, repeats=3)
    parser.add_argument("--only", nargs="+", default=[""], metavar="CELL", help="cells whose names hold these words")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = environment(device)
    same = {"device": here["device"], "suite": asked.suite, "data": asked.rows.name if asked.rows else "made up"}
    kept = kept_in(asked.to, same, here["commit"])

    def found() -> tuple[dict[str, Any], str]:
        outcome = outcome_of(asked.suite, kept, here | same)
        return outcome, table_of(outcome["summaries"], kept.failures)

    with terms_raised(), tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("PEFTUNE_CACHE", f"{scratch}/cache")
        bench = Bench(Path(scratch), asked.rows and asked.rows.resolve())
        wanted = {str(cell): partial(bench.measure, cell) for cell in SUITES[asked.suite]
                  if any(word in str(cell) for word in asked.only)}
        gather(wanted, asked.repeats, device, bench.threads, kept, lambda: save(asked, *found()))
    return publish(asked, *found())


if __name__ == "__main__":
    sys.exit(main())
