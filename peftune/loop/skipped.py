"""Steps whose loss or gradient is not finite: written down with their examples, and few of them borne."""

from __future__ import annotations

import json
import math

from peftune.errors import Fault, SelfCheckError
from peftune.loop.publish import warning_of_refusal, write_text
from peftune.loop.run import Run
from peftune.loop.state import TrainState
from peftune.loop.step import StepStats
from peftune.observe.json_lines import read_json_lines

SKIPPED = "skipped.jsonl"
"""File of the run folder: a line for each skipped step, with the names of its examples."""
SHOWN = 8


def note_skipped(run: Run, state: TrainState, stats: StepStats) -> None:
    """Write down which step was left out, and say so. `state` is the one after it.

    Raises:
        SelfCheckError: more steps in a row than `train.max_skipped_steps`.
    """
    examples = run.work(state.step - 1).ids()
    what = (f"the loss is {stats.loss_sum}" if not math.isfinite(stats.loss_sum)
            else f"the norm of the gradient is {stats.grad_norm}")
    path = run.folder / SKIPPED
    if run.strategy.world.is_main:
        row = {"step": state.step, "why": what, "learning_rate": run.learning_rate(state.step - 1),
               "examples": examples}
        before = read_json_lines(path) if path.is_file() else []
        earlier = [old for old in before if old["step"] < state.step]  # a resumed run does later ones again
        with warning_of_refusal(path, run.journal.warn):
            write_text(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in [*earlier, row]))
    shown = ", ".join(examples[:SHOWN]) + (", ..." if len(examples) > SHOWN else "")
    said = f"step {state.step}: {what}; no weight was changed"
    if state.skipped_in_a_row > run.max_skipped_steps:
        raise SelfCheckError(Fault(
            kind="self_check", file=str(path), message=f"{said}. {state.skipped_in_a_row} steps in a row went this "
            f"way, and train.max_skipped_steps = {run.max_skipped_steps}. Examples: {shown}",
            mend="lower train.learning_rate, or look at these examples; the last checkpoint is sound"))
    run.journal.warn(f"{said}. Its examples are in {path}: {shown}")
