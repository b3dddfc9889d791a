"""Whether two runs are the same, bit for bit: rows, examples, scores and weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TIMES = ("seconds", "tokens_per_second", "peak_memory_bytes")
"""What two equal runs do not share."""
SCORES = ("metrics", "baseline", "best", "best_step", "steps", "examples", "tokens", "supervised_tokens", "exit")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def examples_of(events: Sequence[Mapping[str, Any]]) -> dict[int, list[int]]:
    """Positions of the examples of each step, over all ranks, as the last start that did the step saw them."""
    last: dict[int, int] = {}
    for event in events:
        if event["event"] == "step":
            last[event["step"]] = max(event["attempt"], last.get(event["step"], 0))
    return {step: sorted(at for event in events if (event["event"], event.get("step")) == ("step", step)
                         and event["attempt"] == attempt for at in event["positions"])
            for step, attempt in sorted(last.items())}


def scores_of(folder: Path) -> dict[str, Any]:
    """What summary.json says of what was learned."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {key: summary.get(key) for key in SCORES}


def same_weights(run: Path, twin: Path) -> bool:
    """Whether `final` and `best` hold the same tensors, bit for bit."""
    for part in ("final", "best"):
        names = [sorted(file.name for file in (folder / part).glob("*.safetensors")) for folder in (run, twin)]
        if names[0] != names[1]:
            return False
        for name in names[0]:
            mine, theirs = load_file(run / part / name), load_file(twin / part / name)
            if mine.keys() != theirs.keys() or not all(torch.equal(mine[key], theirs[key]) for key in theirs):
                return False
    return True
