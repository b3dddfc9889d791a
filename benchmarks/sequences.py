"""What do ranks gain that share each sequence, and is it the same training? Memory by ranks, parity by strategy.

    peftune bench sequences [--ranks 1 2 4] [--strategies ddp zero2] [--methods lora] [--to results.json] [--table t.md]

Memory: LoRA on a Llama of four layers, 512 wide, in float32; each step has one row of 8,192 tokens, of which one, two
or four processes hold equal parts. `measured_train.py` says how it is measured. What a step needs is its peak above
what the process holds after it: activations, their gradients and buffers. Parity: the tiny causal_lm run of `parity.py`
with each example in a row of its own, so that every one of them is cut, beside one process with padded rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.deviations import deviations_of
from benchmarks.launches import launched
from benchmarks.memory import ALLOCATOR, MEASURED, MIB
from benchmarks.parity import TOLERANCES, Bench, Cell
from peftune.observe.manifest import environment
from peftune.parallel.names import STRATEGIES
from tests import tiny

TOKENS = 8192
STEPS = 3
SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 4, "initializer_range": 0.02, "max_position_embeddings": TOKENS}
RUNS: tuple[tuple[str, int], ...] = tuple((name, 2) for name in STRATEGIES if name != "single") + (("ddp", 4),)
"""Strategies and processes of the parity part; two processes share each sequence."""
METHODS = ("lora", "full")


def memory_of(folder: Path, ranks: int) -> dict[str, Any]:
    """Peak and rest of the rank that needs most in its last step, in bytes, and what it hands in for exchanges."""
    config = folder / "long.yaml"
    if not config.exists():
        rows = folder / "long.jsonl"
        words = " and ".join(row["text"] for row in tiny.intent_rows(2000))
        rows.write_text("".join(json.dumps({"text": f"{number}: {words}"}) + "\n" for number in range(STEPS)))
        config.write_text(yaml.safe_dump({
            "task": "causal_lm", "adapter": {"method": "lora", "r": 16},
            "model": {"name_or_path": tiny.save_decoder(folder / "long", **SIZES), "dtype": "float32",
                      "gradient_checkpointing": False},
            "data": {"train": str(rows), "validation": None, "max_length": TOKENS, "layout": "packed"},
            "train": {"batch_size": 1, "max_steps": STEPS, "tokens_per_micro_batch": TOKENS},
            "log": {"every_steps": 1, "trackers": []}}))
    run = folder / f"long-{ranks}"
    done = launched("single" if ranks == 1 else "ddp", ranks, [str(config), f"output_dir={run}"], script=MEASURED,
                    environment=ALLOCATOR, timeout=900, sequence_ranks=ranks)
    if done.returncode != 0:
        return {"why": done.stderr[-3000:]}
    found = [json.loads((run / f"memory-{rank}.json").read_text()) for rank in range(ranks)]
    peaks = [rank["peak_bytes"]["steps"][-1] for rank in found]
    rests = [sum(rank["peak_bytes"]["held_after_steps"].values()) for rank in found]
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"peak_bytes": max(peaks), "step_bytes": max(a - b for a, b in zip(peaks, rests, strict=True)),
            "handed_bytes": found[0]["handed_bytes"][-1], "losses": losses}


def parity_of(bench: Bench, strategy: str, processes: int, method: str) -> dict[str, Any]:
    """Deviations of a divided run from one process."""
    cell = Cell(strategy, method, "causal_lm", "padded, one micro-batch")
    run = bench.folder / f"{strategy}-{processes}-{method}"
    done = launched(strategy, processes, [str(bench.config(cell)), f"output_dir={run}", "data.layout=packed",
                                          "train.tokens_per_micro_batch=1"], sequence_ranks=2)
    if done.returncode != 0:
        return {"why": done.stderr[-3000:]}
    return deviations_of(run, bench.reference(cell), "causal_lm")


def table_of(results: Mapping[str, Any]) -> str:
    """Markdown: memory by ranks, then the largest deviations by strategy."""
    lines = ["| ranks that share a row | peak RSS in steps (MiB) | of which the step itself (MiB) | handed in per step "
             "(MiB) |", "| ---: | ---: | ---: | --- |"]
    for ranks, cell in results["memory"].items():
        handed = ", ".join(f"{kind} {count / MIB:,.1f}" for kind, count in cell.get("handed_bytes", {}).items()
                           if count >= 0.05 * MIB)
        lines.append(f"| {ranks} | " + ("**failed** | | |" if "why" in cell else
                     f"{cell['peak_bytes'] / MIB:,.0f} | {cell['step_bytes'] / MIB:,.0f} | {handed} |"))
    names = list(TOLERANCES)
    lines += ["", f"| strategy | processes | method | {' | '.join(names)} |",
              "| --- | ---: | --- |" + " ---: |" * len(names)]
    for cell in results["parity"]:
        found = "**failed** |" if "why" in cell else " | ".join(f"{cell[name]:.0e}" for name in names) + " |"
        lines.append(f"| {cell['strategy']} | {cell['processes']} | {cell['method']} | {found}")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what is asked for, write what was found after each, and say whether anything failed or deviates."""
    parser = argparse.ArgumentParser(prog="peftune bench sequences", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2, 4], metavar="N")
    strategies = sorted({name for name, _ in RUNS})
    for name, choices in (("strategies", strategies), ("methods", list(METHODS))):
        parser.add_argument(f"--{name}", nargs="*", choices=choices, default=choices, metavar=name[:-1].upper())
    parser.add_argument("--to", type=Path)
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    results: dict[str, Any] = {**environment(torch.device("cpu")), "tokens": TOKENS, "steps": STEPS, "sizes": SIZES,
                               "runs": 1, "tolerances": TOLERANCES, "memory": {}, "parity": []}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("PEFTUNE_CACHE", f"{scratch}/cache")
        for ranks in asked.ranks:
            results["memory"][ranks] = memory_of(Path(scratch), ranks)
            _write(asked, results)
        bench = Bench(Path(scratch) / "bench")
        for method in asked.methods:
            for strategy, processes in (run for run in RUNS if run[0] in asked.strategies):
                found = parity_of(bench, strategy, processes, method)
                results["parity"].append({"strategy": strategy, "processes": processes, "method": method, **found})
                _write(asked, results)
    print(table_of(results))
    bad = [cell for cell in [*results["memory"].values(), *results["parity"]]
           if "why" in cell or any(cell.get(name, 0) > limit for name, limit in TOLERANCES.items())]
    print("\n".join(cell["why"] for cell in bad if "why" in cell))
    return 1 if bad else 0


def _write(asked: argparse.Namespace, results: Mapping[str, Any]) -> None:
    for path, text in ((asked.to, json.dumps(results, indent=1) + "\n"), (asked.table, table_of(results))):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
