"""Does saving hold up the steps? Runs that save every few steps, beside the same runs that do not.

    peftune bench saving [--strategies single fsdp2] [--threads N] [--steps 34] [--rounds 2] [--to results.json]

A Llama of 100 million weights, drawn from its config, trains all of them in float32: 1.2 GB a checkpoint. Each round
has a run that saves only at its end, one that copies and lets a thread write while it trains
(checkpoint.asynchronous=true), and one that waits for the disk, in this order; all runs of a strategy share a launch
(many_runs.py). `timed_saving.py` says what is timed. A step is counted as slow as its slowest rank, and the first two,
in which the run checks itself, are left out.

`steps_while_writing_s` are the steps that share any instant with the thread's writing, hashing, reading back or
publishing (`written_s`). In a save the loop stands still for `blocked_s`, to look at the weights and copy them and the
optimizer's state, and for `waited_s`, until this checkpoint is on the disk, or the one before where it trains on. Runs
must agree bit for bit: the loss and the gradient norm of every step, and the files of the last checkpoint.

The processes together have a thread for each core, as in every run on CPUs, so that the writing has no core for itself;
`--threads 1` leaves it one where there are two cores and one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.arithmetic import percentile
from benchmarks.launches import Run, launched_together
from benchmarks.memory import SIZES
from peftune.loop.checkpoint import MANIFEST
from peftune.observe.manifest import environment
from tests import tiny

TIMED = Path(__file__).resolve().parent / "timed_saving.py"
PROCESSES = {"single": 1, "ddp": 2, "zero2": 2, "zero3": 2, "fsdp2": 2}
EVERY_STEPS, ROW_TOKENS = 8, 128
WAYS = {
    "at its end": ["checkpoint.every_steps=1000000"],
    "in the background": [f"checkpoint.every_steps={EVERY_STEPS}", "checkpoint.asynchronous=true"],
    "waiting": [f"checkpoint.every_steps={EVERY_STEPS}", "checkpoint.asynchronous=false"],
}
CHECKED_STEPS = 2
"""The first ones, in which a run checks itself."""
Span = Sequence[float]
"""[begin, end] in seconds."""


def save_inputs(folder: Path, steps: int) -> Path:
    """The model, rows and config of all runs; one row a step, as long as it may be."""
    model = tiny.save_decoder(folder / "decoder", **SIZES)
    rows = folder / "train.jsonl"
    rows.write_text("".join(json.dumps({"text": f"question {i} about the {noun}? " * 40}) + "\n"
                            for i, noun in enumerate(tiny.NOUNS * 2)))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({
        "task": "causal_lm", "adapter": None,
        "model": {"name_or_path": model, "dtype": "float32", "gradient_checkpointing": False},
        "data": {"train": str(rows), "validation": None, "max_length": ROW_TOKENS},
        "train": {"batch_size": 2, "max_steps": steps, "learning_rate": 1e-4, "tokens_per_micro_batch": ROW_TOKENS},
        "checkpoint": {"keep": 1}, "log": {"every_steps": 1, "trackers": []}}))
    return path


def run_rounds(folder: Path, strategy: str, rounds: int, config: Path, threads: int | None) -> dict[str, Any]:
    """All runs of a strategy, and what they come to."""
    names = [(way, round_) for round_ in range(rounds) for way in WAYS]
    folders = [folder / "runs" / f"{strategy}-{i}" for i in range(len(names))]
    ended = launched_together(strategy, PROCESSES[strategy], [
        Run([str(config), f"output_dir={run}", *WAYS[way]], TIMED, {"TIMED_THREADS": str(threads or "")})
        for (way, _), run in zip(names, folders, strict=True)], folder / "logs" / strategy)
    for one in ended:
        assert one.returncode == 0, one.stderr[-3000:]
    found: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in WAYS}
    for (way, _), run in zip(names, folders, strict=True):
        ranks = [json.loads((run / f"times-{rank}.json").read_text()) for rank in range(PROCESSES[strategy])]
        assert all(rank["strategy"] == strategy for rank in ranks), "another strategy ran than was asked for"
        found[way].append(ranks)
    outcomes = [_outcome(run) for run in folders]
    return {
        "strategy": strategy, "processes": PROCESSES[strategy], "threads": ranks[0]["threads"],
        "trainable_parameters": ranks[0]["trainable"],
        "checkpoint_bytes": sum(file.stat().st_size for file in _last_checkpoint(folders[0]).iterdir()),
        "equal_losses_and_checkpoints": all(outcome == outcomes[0] for outcome in outcomes),
        "losses": [loss for loss, _ in outcomes[0][0]],
        "ways": {way: summary_of(runs) for way, runs in found.items()}, "times": found}


def _outcome(run: Path) -> tuple[list[tuple[float, float]], dict[str, str]]:
    rows = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    sums = json.loads((_last_checkpoint(run) / MANIFEST).read_text())["sha256"]
    return ([(row["loss"], row["grad_norm"]) for row in rows if row["split"] == "train"],
            {name: sum_ for name, sum_ in sums.items() if name.endswith(".safetensors")})


def _last_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def summary_of(runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Figures of the runs of one way, each given by its ranks; without the last save, which every way waits for."""
    beside, other, blocked, waited, written = [], [], [], [], []
    for ranks in runs:
        main = ranks[0]
        busy = [span for rank in ranks for kind in ("writes", "publications") for span in rank[kind]]
        for step in zip(*(rank["steps"][CHECKED_STEPS:] for rank in ranks), strict=True):
            seconds = max(end - begin for begin, end in step)
            (beside if any(_meet(step[0], span) for span in busy) else other).append(seconds)
        for i, save in enumerate(main["saves"][:-1]):
            wait = sum(end - begin for begin, end in main["waits"] if _meet((begin, end), save))
            waited.append(wait)
            blocked.append(save[1] - save[0] - wait)
            written.append(main["publications"][i][1] - main["writes"][i][0])
    return {"steps_s": _spread(other), "steps_while_writing_s": _spread(beside), "blocked_s": _spread(blocked),
            "waited_s": _spread(waited), "written_s": _spread(written),
            "from_third_step_to_last_s": [ranks[0]["steps"][-1][1] - ranks[0]["steps"][CHECKED_STEPS][0]
                                          for ranks in runs]}


def _meet(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Nearest-rank percentiles; None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    return {"count": len(ordered), "p50": statistics.median_low(ordered),
            "p95": percentile(ordered, 0.95), "max": ordered[-1]}


def main() -> int:
    """Measure what is asked for, write it after each strategy, and say whether any runs differ."""
    parser = argparse.ArgumentParser(prog="peftune bench saving", description=__doc__.splitlines()[0])
    parser.add_argument("--strategies", nargs="+", choices=list(PROCESSES), default=["single", "fsdp2"],
                        metavar="STRATEGY")
    parser.add_argument("--threads", type=int, help="of each process; default: the run's own")
    parser.add_argument("--steps", type=int, default=34)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--to", type=Path, help="results; strategies that are there already and not run now stay")
    asked = parser.parse_args()
    results = json.loads(asked.to.read_text())["strategies"] if asked.to and asked.to.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("PEFTUNE_CACHE", f"{scratch}/cache")
        config = save_inputs(Path(scratch), asked.steps)
        for strategy in asked.strategies:
            found = run_rounds(Path(scratch), strategy, asked.rounds, config, asked.threads)
            results[f"{strategy}, {found['threads']} threads a process"] = {
                **environment(torch.device("cpu")), "steps": asked.steps, "rounds": asked.rounds, **found}
            print(strategy, json.dumps({key: found[key] for key in (
                "checkpoint_bytes", "equal_losses_and_checkpoints", "ways")}, indent=1), flush=True)
            if asked.to:
                asked.to.parent.mkdir(parents=True, exist_ok=True)
                asked.to.write_text(json.dumps({"sizes": SIZES, "every_steps": EVERY_STEPS, "row_tokens": ROW_TOKENS,
                                                "strategies": results}, indent=1) + "\n")
    return 0 if all(one["equal_losses_and_checkpoints"] for one in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
