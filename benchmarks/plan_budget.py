"""How much of a given memory do `auto` settings fill? Ten configs, each with a budget that 4,096 tokens would not fit.

    peftune bench plan_budget [--allocator tcmalloc glibc] [--only 0 7] [--to results.json] [--table table.md]

A budget is what PEFTUNE_MEMORY_BYTES says: bytes that the process may take in all, libraries among them. Measured is
the highest resident memory of the whole run, from reading the data to the last evaluation and save: under tcmalloc,
which `peftune train` preloads where it is installed, and under glibc's allocator, which holds up to twice what tensors
take, so that a run within its budget fills less of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.launches import Run, launched_together
from benchmarks.plan import LORA, MEASURED, MIB, Bench, Cell, write
from peftune.observe.manifest import environment
from peftune.parallel.host_memory import LIMIT, PRELOAD, preload
from tests import tiny

STEPS, BATCH = 8, 32
"""The third step is followed byte by byte, the later ones are measured."""
LOW, HIGH = 0.85, 0.97
"""Share of the budget that a run is to fill."""
ALLOCATORS = ("tcmalloc", "glibc")
RUN_LIMIT_S = 1800


@dataclass(frozen=True, slots=True)
class Budget:
    """A config, and what it may take."""

    cell: Cell
    mib: int


BUDGETS = (
    Budget(Cell("llama-5m", "lora", length=320), 970), Budget(Cell("llama-5m", "full", layout="padded"), 1060),
    Budget(Cell("llama-30m", "lora", length=320), 1710), Budget(Cell("llama-30m", "full", length=320), 2145),
    Budget(Cell("llama-30m", "lora", "bfloat16", layout="padded", length=320), 1200),
    Budget(Cell("llama-30m", "nf4", "bfloat16", length=320), 1160), Budget(Cell("qwen-60m", "lora"), 2145),
    Budget(Cell("qwen-60m", "full", "bfloat16", length=320), 2940), Budget(Cell("bert-30m", "lora"), 1360),
    Budget(Cell("modernbert-40m", "full", length=320), 2040),
)


def rows(folder: Path, cell: Cell) -> str:
    """Rows of many lengths, up to and beyond `cell.length` tokens."""
    path = folder / f"ragged-{cell.is_decoder}-{cell.length}.jsonl"
    made = []
    for i in range(BATCH * STEPS):
        words = " ".join([tiny.NOUNS[0]] * (8 + i * 37 % (cell.length // 2)))
        made.append({"prompt": f"{i} {words}", "completion": f" {words}"} if cell.is_decoder else
                    {"text": f"{i} {words} {words}", "label": str(i % 2)})
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def config_of(bench: Bench, number: int) -> Path:
    """A budget's config: the memory decides what the grid's cells fix."""
    cell = BUDGETS[number].cell
    path = bench.folder / f"budget-{number}.yaml"
    path.write_text(yaml.safe_dump({
        "task": "causal_lm" if cell.is_decoder else "sequence_classification",
        "adapter": None if cell.method == "full" else LORA,
        "model": {"name_or_path": bench.model(cell.model), "dtype": cell.dtype,
                  "quantization": "nf4" if cell.method == "nf4" else "none"},
        "data": {"train": rows(bench.folder, cell), "validation": 0.1, "max_length": cell.length,
                 "layout": cell.layout},
        "train": {"batch_size": BATCH, "max_steps": STEPS},
        "evaluation": {"max_new_tokens": 0}, "log": {"trackers": []}}))
    return path


def measured(bench: Bench, allocator: str, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """What each of these budgets' runs chose, predicted and took."""
    os.environ.update({PRELOAD: ""} if allocator == "glibc" else {})  # a launch would preload tcmalloc otherwise
    folders = {number: bench.folder / f"{allocator}-{number}" for number in numbers}
    runs = [Run([str(config_of(bench, number)), f"output_dir={folder}"], script=MEASURED,
                environment={LIMIT: str(BUDGETS[number].mib * MIB)}) for number, folder in folders.items()]
    found = []
    together = launched_together("single", 1, runs, bench.folder / allocator, limit_s=RUN_LIMIT_S)
    for number, ended in zip(numbers, together, strict=True):
        file = folders[number] / "plan-0.json"
        taken = json.loads(file.read_text()) if ended.returncode == 0 else {"why": ended.stderr[-2000:]}
        found.append({"allocator": allocator, **asdict(BUDGETS[number]), "found": taken})
    os.environ.pop(PRELOAD, None)
    return found


def share_of(result: Mapping[str, Any]) -> float:
    """Of the budget, how much was taken."""
    found = result["found"]
    return (found["baseline_bytes"] + max(found["resident_bytes"].values())) / MIB / result["mib"]


def within(result: Mapping[str, Any]) -> bool:
    """Whether a run kept to its budget, and filled it where its allocator lets it."""
    return "why" not in result["found"] and (
        LOW <= share_of(result) <= HIGH if result["allocator"] == "tcmalloc" else share_of(result) <= HIGH)


def table_of(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row a budget."""
    lines = ["| allocator | model | method | dtype | length | layout | budget (MiB) | tokens a micro-batch "
             "| recomputed | taken (MiB) | share |",
             "| --- | --- | --- | --- | ---: | --- | ---: | ---: | --- | ---: | ---: |"]
    for result in results:
        cell, found = result["cell"], result["found"]
        words = " | ".join([result["allocator"], *(
            str(cell[key]) for key in ("model", "method", "dtype", "length", "layout"))])
        if "why" in found:
            lines.append(f"| {words} | {result['mib']:,} | **failed** | | | |")
            continue
        lines.append(f"| {words} | {result['mib']:,} | {found['micro_batch_tokens']:,} | {found['recompute']} | "
                     f"{share_of(result) * result['mib']:,.0f} | {share_of(result):.1%} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run all budgets, and say whether any run failed or left the band."""
    parser = argparse.ArgumentParser(prog="peftune bench plan_budget", description=__doc__.splitlines()[0])
    parser.add_argument("--allocator", nargs="*", choices=ALLOCATORS, default=list(ALLOCATORS))
    parser.add_argument("--only", nargs="*", type=int, choices=range(len(BUDGETS)), default=list(range(len(BUDGETS))),
                        metavar="NUMBER", help="of budgets, as they stand in the table from 0 on")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    if "tcmalloc" in asked.allocator and not preload():
        parser.error("tcmalloc is not installed, or LD_PRELOAD says otherwise: apt install libtcmalloc-minimal4, or "
                     "--allocator glibc")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("PEFTUNE_CACHE", f"{scratch}/cache")
        bench = Bench(Path(scratch))
        results = [result for allocator in asked.allocator for result in measured(bench, allocator, asked.only)]
    write(asked.table, table_of(results))
    if asked.to:
        write(asked.to, json.dumps({**environment(torch.device("cpu")), "steps": STEPS, "batch_size": BATCH,
                                    "runs": 1, "budgets": results}, indent=1) + "\n")
    return 0 if all(map(within, results)) else 1


if __name__ == "__main__":
    sys.exit(main())
