"""Where does the time of a training step go? Operators of one step of the true model and batches, by torch's profiler.

    peftune bench step_profile [--rows instructions.jsonl] [--threads 1] [--to results.json]

LoRA r 16 on a Llama of 60 million weights, packed, 8 examples. The fourth step is looked at; self time, so that the
shares add up to 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed_cells import Cell
from benchmarks.subjects import SHAPES, token_rows, work_flops
from benchmarks.throughput import Bench
from benchmarks.turns import ceiling
from peftune.build import build
from peftune.config.load import load
from peftune.loop.step import train_step
from peftune.observe.manifest import environment

CELL = Cell(rows=32, batch_size=8)
LOOKED_AT = 3
SMALLEST_SHARE = 0.005


def main() -> int:
    """Profile a step and print its operators."""
    parser = argparse.ArgumentParser(prog="peftune bench step_profile", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, help='JSON lines of {"instruction", "input", "output"}; default: made up')
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--to", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("PEFTUNE_CACHE", f"{scratch}/cache")
        config = Bench(Path(scratch), asked.rows and asked.rows.resolve()).config(CELL)
        top = ceiling(torch.device("cpu"), asked.threads)  # also sets the threads
        with build(load([str(config), "data.validation=null"])) as built:
            run = built.run
            assert run is not None, "a measured run starts in an empty folder"
            run.model.train()
            for step in range(LOOKED_AT + 1):
                with profile(activities=[ProfilerActivity.CPU]) as seen:
                    stats = train_step(run.model, run.work(step), run.optimizer, run.strategy, losses=run.losses,
                                       autocast=run.autocast, max_grad_norm=run.max_grad_norm)
        rows = token_rows(config, "train")
        flops = work_flops(rows, SHAPES[CELL.shape], run.facts["trainable_parameters"], config)
    found = sorted(((one.key, one.count, one.self_cpu_time_total / 1e6) for one in seen.key_averages()),
                   key=lambda one: -one[2])
    whole = sum(seconds for _, _, seconds in found)
    operators = [{"operator": name, "calls": calls, "seconds": seconds, "share": seconds / whole}
                 for name, calls, seconds in found if seconds / whole >= SMALLEST_SHARE]
    for one in operators:
        print(f"{one['share']:6.1%} {one['seconds']:8.3f} s {one['calls']:6} {one['operator']}")
    needed = flops / sum(len(row["input_ids"]) for row in rows) * stats.tokens
    outcome = {**environment(torch.device("cpu")), "threads": asked.threads, "tokens": stats.tokens, "seconds": whole,
               "needed_flops": needed, "ceiling_flops": top, "floor_seconds": needed / top, "operators": operators}
    print(f"{whole:.2f} s for {stats.tokens:,} tokens; products alone, at the ceiling: {needed / top:.2f} s")
    if asked.to:
        asked.to.write_text(json.dumps(outcome, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
