"""How fast the true loop is: accelerate launch benchmarks/timed_train.py CONFIG.yaml [key=value ...]

The run is peftune/train.py's, to its end. `timing-<rank>.json` in the run folder then says, for each step: seconds from
the end of the step before to its own end, so that all that the loop does between steps counts; tokens with and without
padding, supervised tokens and examples. And the seconds of each evaluation and checkpoint, the highest resident memory
within the steps (Linux's VmHWM, set back where the first one begins), on a GPU the most that was allocated and reserved
within them, and the seconds from BENCH_STARTED, a time of the launcher's in the environment, to the end of the first
step.

BENCH_BARE=1 trains without the loop: forward, backward, clipping and optimizer of the same model on the same batches,
laid out beforehand, and nothing else. What the loop takes on top of that is its overhead. BENCH_NATIVE=1 leaves
products of bfloat16 to torch on every CPU, BENCH_ANY_SIZE=1 packed rows as long as their examples are,
BENCH_ONE_BY_ONE=1 attention to one packed sequence after another.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import peftune.build as composition
import peftune.loop.finish as ending
import peftune.loop.fit as loop
import peftune.loop.judge as judging
import peftune.loop.layout as layouts
import peftune.loop.run as running
import peftune.model.precision as precision
import peftune.numerics.few_shapes as few_shapes
import peftune.numerics.linear_loss as linear_loss
from benchmarks.measured_train import new_phase
from peftune.config.load import load
from peftune.data.examples import Batch
from peftune.data.layouts import Layout
from peftune.errors import EXIT_DONE, guarded
from peftune.loop.optimizer import set_learning_rate
from peftune.numerics.few_shapes import filled_up


class Timing:
    """What a run has taken so far."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        """perf_counter at the end of each step, and at the begin of the first."""
        self.first_step_s = 0.0
        self.counts: dict[str, list[int]] = {name: [] for name in ("tokens", "total_tokens", "supervised_tokens",
                                                                   "examples")}
        self.laid_out = 0
        """Tokens with padding, since the last step's end."""
        self.seconds: dict[str, list[float]] = {"evaluation": [], "checkpoint": []}
        self.evaluated_tokens: list[int] = []
        self.before_bytes = self.steps_bytes = 0
        self.peaks: dict[str, int | None] = {"peak_reserved_bytes": None, "peak_allocated_bytes": None}
        """Of the GPU's memory within the steps."""

    def begin(self) -> None:
        """The first step begins."""
        self.before_bytes = new_phase()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.ends.append(time.perf_counter())

    def end(self, *, tokens: int, targets: int, examples: int) -> None:
        """A step has ended."""
        self.ends.append(time.perf_counter())
        if len(self.ends) == 2:
            self.first_step_s = time.time() - float(os.environ["BENCH_STARTED"])
        for name, count in (("tokens", tokens), ("total_tokens", self.laid_out), ("supervised_tokens", targets),
                            ("examples", examples)):
            self.counts[name].append(count)
        self.laid_out = 0

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same work, timed."""
        def measured(*given: Any, **named: Any) -> Any:
            self.leave_steps()
            started = time.perf_counter()
            result = work(*given, **named)
            self.seconds[name].append(time.perf_counter() - started)
            if name == "evaluation":
                self.evaluated_tokens.append(int(given[2].padded_lengths.sum()))
            return result

        return measured

    def leave_steps(self) -> None:
        """What is done next is no step; the first such thing ends what counts as their memory."""
        if self.ends and not self.steps_bytes:
            self.steps_bytes = new_phase()
            if torch.cuda.is_available():
                self.peaks = {"peak_reserved_bytes": torch.cuda.max_memory_reserved(),
                              "peak_allocated_bytes": torch.cuda.max_memory_allocated()}

    def as_json(self) -> dict[str, Any]:
        """For the file."""
        return {"first_step_s": self.first_step_s, **self.counts,
                "step_seconds": [after - before for before, after in zip(self.ends, self.ends[1:])],
                "evaluation_seconds": self.seconds["evaluation"], "evaluation_tokens": self.evaluated_tokens,
                "checkpoint_seconds": self.seconds["checkpoint"], "before_steps_bytes": self.before_bytes,
                "steps_bytes": self.steps_bytes, **self.peaks, "threads": torch.get_num_threads()}


def laid_out(batch: Batch, layout: Layout) -> int:
    """Tokens that the model's body computes, padding among them."""
    ids, lengths = batch.inputs["input_ids"], batch.inputs.get("segment_lengths")
    if lengths is None or len(ids) == 1:
        return ids.numel()
    return filled_up(sum(lengths)) if layout.few_sizes else sum(lengths)


def bare(built: Any, timing: Timing) -> None:
    """Train all steps without the loop."""
    run = built.run
    model, parameters = run.model, [p for group in run.optimizer.param_groups for p in group["params"]]
    work = [run.work(step) for step in range(run.steps)]
    batches = [list(one.micro_batches) for one in work]
    timing.laid_out = 0
    model.train()
    timing.begin()
    for step, (one, parts) in enumerate(zip(work, batches, strict=True)):
        set_learning_rate(run.optimizer, run.learning_rate(step))
        for batch in parts:
            with run.autocast():
                nats = run.losses(model, batch).sum()
            (nats / one.targets).backward()
        if run.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, run.max_grad_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
        timing.laid_out = sum(laid_out(batch, run.layout) for batch in parts)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the loop's step waits too: it reads the loss
        timing.end(tokens=one.tokens, targets=one.targets, examples=one.examples)
    timing.leave_steps()


def main(arguments: list[str]) -> int:
    """Train, and write what was measured."""
    config, timing = load(arguments), Timing()
    plain_step, plain_lay_out = loop.train_step, running.lay_out

    def lay_out(*given: Any, **named: Any) -> Any:
        batch = plain_lay_out(*given, **named)
        timing.laid_out += laid_out(batch, named["layout"])
        return batch

    def step(*given: Any, **named: Any) -> Any:
        if not timing.ends:
            timing.begin()
        stats = plain_step(*given, **named)
        timing.end(tokens=stats.tokens, targets=stats.targets, examples=stats.examples)
        return stats

    running.lay_out, loop.train_step = lay_out, step
    if os.environ.get("BENCH_NATIVE"):
        precision.lacks_bfloat16 = lambda: False
    if os.environ.get("BENCH_ONE_BY_ONE"):
        layouts.kernel_fault = lambda *_: "left out"
    if os.environ.get("BENCH_ANY_SIZE"):
        for room in (few_shapes, linear_loss):
            room.makes_code_slowly = lambda dtype: False
    judging.evaluate = ending.evaluate = timing.timed("evaluation", ending.evaluate)
    loop.save = timing.timed("checkpoint", loop.save)
    with composition.build(config) as built:
        assert built.run is not None, "a measured run starts in an empty folder"
        run = built.run
        if os.environ.get("BENCH_BARE"):
            bare(built, timing)
        else:
            ending.finish(run, loop.fit(run, built.state))
        facts = {"layout": run.layout.name, "micro_batch_tokens": run.micro_batch_tokens,
                 "strategy": run.strategy.name, "ranks": run.strategy.world.ranks,
                 "trainable_parameters": run.facts["trainable_parameters"],
                 "total_parameters": run.facts["total_parameters"]}
        (run.folder / f"timing-{run.strategy.world.rank}.json").write_text(json.dumps(timing.as_json() | facts))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
