"""When steps and saving begin and end in a run: accelerate launch benchmarks/timed_saving.py CONFIG.yaml [key=value]

The run is peftune/train.py's up to the last step's checkpoint: `build`, then `fit`. `times-<rank>.json` in the run
folder then holds, in seconds of one clock, [begin, end] of

- each step;
- each call that saves, as the loop sees it: for so long no step can begin. Of it, the wait for the checkpoint before;
- each file that the writing thread writes (this rank's own tensors), and each checkpoint that it hashes, reads back and
  publishes, which the main process's does.

TIMED_THREADS, if it is set, is how many threads compute in each process.
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

import peftune.loop.fit as loop
import peftune.loop.saver as saver
from peftune.build import build
from peftune.config.load import load
from peftune.errors import EXIT_DONE, guarded


def timed(call: Callable[..., Any], times: list[tuple[float, float]]) -> Callable[..., Any]:
    """The same function, noting when it begins and ends."""
    def noted(*given: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        try:
            return call(*given, **named)
        finally:
            times.append((begun, time.perf_counter()))

    return noted


def main(arguments: list[str]) -> int:
    """Train, and write down what was timed."""
    times: dict[str, list[tuple[float, float]]] = {
        name: [] for name in ("steps", "saves", "waits", "writes", "publications")}
    loop.train_step = timed(loop.train_step, times["steps"])
    loop.save = timed(loop.save, times["saves"])
    saver._write_own = timed(saver._write_own, times["writes"])
    for name, kind in (("settle", "waits"), ("_publish", "publications")):
        setattr(saver.Saver, name, timed(getattr(saver.Saver, name), times[kind]))
    with build(load(arguments)) as built:
        assert built.run is not None, "a measured run starts in an empty folder"
        if threads := os.environ.get("TIMED_THREADS"):
            torch.set_num_threads(int(threads))
        loop.fit(built.run, built.state)
        world = built.run.strategy.world
        (built.run.folder / f"times-{world.rank}.json").write_text(json.dumps(
            {"strategy": built.run.strategy.name, "threads": torch.get_num_threads(),
             "trainable": built.run.facts["trainable_parameters"], **times}),
            encoding="utf-8")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
