"""What both peers' scripts share: the job, its rows, and how a Trainer's steps are measured.

A job is a JSON file: model, train, validation (JSON lines of input_ids and labels, or label), task, peer, examples a
step, rows a micro-batch, steps, learning_rate, adapter, recompute, to. Nothing here needs peftune.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


def job() -> dict[str, Any]:
    """The file named on the command line."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


def rows_of(path: str) -> list[dict[str, Any]]:
    """JSON lines."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def new_phase() -> int:
    """Highest resident memory since the last call, in bytes, as benchmarks/measured_train.py measures it for ours."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) * 1024


class Measured(TrainerCallback):
    """Seconds from the end of one step to the end of the next, and what was computed in between."""

    def __init__(self, model: torch.nn.Module, ignore: int = -100) -> None:
        self.ignore = ignore
        self.now: dict[str, Any] = {"tokens": 0, "total_tokens": 0, "supervised_tokens": 0, "examples": 0}
        """Numbers, or tensors where the device would be waited for to know them."""
        self.steps: dict[str, list[Any]] = {name: [] for name in self.now}
        self.ends: list[float] = []
        self.first_step_s = 0.0
        self.before_bytes = self.steps_bytes = 0
        self.peak_allocated_bytes: int | None = None
        """On the GPU, if there is one."""
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: torch.nn.Module, given: Any, named: dict[str, Any]) -> None:
        if not model.training:
            return
        ids, mask, labels = named["input_ids"], named.get("attention_mask"), named["labels"]
        positions = named.get("position_ids")
        self.now["total_tokens"] += ids.numel()
        self.now["tokens"] += ids.numel() if mask is None else mask.sum()
        self.now["supervised_tokens"] += (labels != self.ignore).sum()
        packed = mask is None and positions is not None
        self.now["examples"] += (positions == 0).sum() if packed else len(ids)

    def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if not self.ends:
            self.before_bytes = new_phase()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self.ends.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # our loop's step waits for the device too
        self.ends.append(time.perf_counter())
        if len(self.ends) == 2:
            self.first_step_s = time.time() - float(os.environ["BENCH_STARTED"])
        for name in self.now:
            self.steps[name].append(self.now[name])
            self.now[name] = 0

    def counts(self) -> dict[str, list[int]]:
        """Of each step."""
        return {name: [int(value) for value in values] for name, values in self.steps.items()}

    def on_train_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.steps_bytes = new_phase()
        if torch.cuda.is_available():
            self.peak_allocated_bytes = torch.cuda.max_memory_allocated()


def finish(done: dict[str, Any], model: Any, clock: Measured) -> None:
    """Score the validation rows, one after another, and write the record."""
    model.eval()
    nats = count = tokens = 0.0
    started = time.perf_counter()
    with torch.no_grad(), torch.autocast(model.device.type, dtype=torch.bfloat16):
        for row in rows_of(done["validation"]):
            ids = torch.tensor([row["input_ids"]], device=model.device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
            if "labels" in row:
                labels = torch.tensor(row["labels"], device=model.device)[1:]
                logits = logits[0, :-1]
            else:
                labels = torch.tensor([row["label"]], device=model.device)
            nats += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
            count += int((labels != -100).sum())
            tokens += ids.numel()
    from importlib import metadata

    Path(done["to"]).write_text(json.dumps({
        **clock.counts(), "step_seconds": [after - before for before, after in zip(clock.ends, clock.ends[1:])],
        "first_step_s": clock.first_step_s, "before_steps_bytes": clock.before_bytes, "steps_bytes": clock.steps_bytes,
        "peak_allocated_bytes": clock.peak_allocated_bytes,
        "evaluation_loss": nats / count, "evaluation_tokens": [tokens],
        "evaluation_seconds": [time.perf_counter() - started], "threads": torch.get_num_threads(),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "packages": {name: metadata.version(name) for name in done["packages"]},
    }))
