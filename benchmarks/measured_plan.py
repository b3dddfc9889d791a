"""What a rank really holds, beside its plan: accelerate launch benchmarks/measured_plan.py CONFIG.yaml [key=value]

The run is peftune/train.py's, to its end. `plan-<rank>.json` in the run folder then says, in bytes, what was predicted
before the weights were loaded, and what was measured:

- tensors: the highest sum of live tensors within the third step, by the watch that the plan uses (`plan/live.py`) on
  the real tensors. Left out where storages come or change behind torch's operators: DDP's buckets, ZeRO's and FSDP2's
  divided weights.
- resident: the process's highest resident memory in each instant, above what it was when the libraries were imported
  and the data was read (VmHWM, set back where an instant begins). Where glibc maps each large block by itself, it
  gives back the small ones that it holds free before that; as it comes, it does not, since no other run would.
  `step` is the largest of the steps after the third; `between steps` is what lies there before such a step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch import Tensor

import peftune.build as composition
import peftune.loop.finish as ending
import peftune.loop.fit as loop
import peftune.loop.judge as judging
from benchmarks.measured_train import new_phase, resident
from peftune.config.load import load
from peftune.errors import EXIT_DONE, guarded
from peftune.model.quantize import quantised_tensors
from peftune.parallel.host_memory import allocator
from peftune.plan.live import LiveBytes

WATCHED_STEP = 3
UNSEEN = ("ddp", "zero1", "zero2", "zero3", "zero3-offload", "fsdp2")


class Measured:
    """The peaks so far."""

    def __init__(self) -> None:
        self.baseline, self.tensors, self.steps = 0, 0, 0
        self.new_phase = partial(new_phase, trimmed=allocator() == "glibc, mapping")
        self.resident: dict[str, int] = {}

    def begin(self) -> None:
        """What is there now is the baseline."""
        self.new_phase()
        self.baseline = resident("VmRSS")

    def phase(self, name: str) -> None:
        """An instant ends here."""
        self.resident[name] = max(self.resident.get(name, 0), self.new_phase() - self.baseline)

    def within(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same work, measured as an instant."""
        def measured(*given: Any, **named: Any) -> Any:
            self.new_phase()
            result = work(*given, **named)
            self.phase(name)
            return result

        return measured


def main(arguments: list[str]) -> int:
    """Train, and write what was predicted and measured."""
    config, found = load(arguments), Measured()
    plain_step, plain_choice = loop.train_step, composition.memory_of_run

    def chosen(*given: Any) -> Any:
        choice = plain_choice(*given)
        found.begin()
        return choice

    def step(model: Any, work: Any, optimizer: Any, strategy: Any, **named: Any) -> Any:
        found.steps += 1
        found.new_phase()
        if found.steps == WATCHED_STEP and strategy.name not in UNSEEN:
            live = LiveBytes()
            live.hold(model.parameters(), "weights")
            live.hold(model.buffers(), "weights")
            for module in model.modules():
                live.hold((tensor for _, _, tensor in quantised_tensors(module)), "weights")
            live.hold((value for state in optimizer.state.values() for value in state.values()
                       if isinstance(value, Tensor)), "optimizer")
            with live:
                stats = plain_step(model, work, optimizer, strategy, **named)
            found.tensors = max(peak.live_bytes for peak in live.peaks.values())
            return stats
        if found.steps > WATCHED_STEP:
            found.phase("between steps")
        stats = plain_step(model, work, optimizer, strategy, **named)
        if found.steps > WATCHED_STEP:
            found.phase("step")
        return stats

    composition.memory_of_run, loop.train_step = chosen, step
    judging.evaluate = ending.evaluate = found.within("evaluation", ending.evaluate)
    ending.publish_final = found.within("save", ending.publish_final)
    loop.save = found.within("checkpoint", loop.save)
    with composition.build(config) as built:
        assert built.run is not None, "a measured run starts in an empty folder"
        found.phase("load")
        world = built.run.strategy.world
        ending.finish(built.run, loop.fit(built.run, built.state))
        memory = built.run.facts["memory"]
        (built.run.folder / f"plan-{world.rank}.json").write_text(json.dumps({
            "strategy": built.run.strategy.name, "layout": built.run.layout.name, "predicted": memory["predicted"],
            "why_not": memory.get("why_not", ""), "micro_batch_tokens": built.run.micro_batch_tokens,
            "recompute": built.run.facts["gradient_checkpointing"],
            "parameters": built.run.facts["total_parameters"], "trainable": built.run.facts["trainable_parameters"],
            "baseline_bytes": found.baseline, "tensor_bytes": found.tensors, "resident_bytes": found.resident}))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
