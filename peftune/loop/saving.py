"""A run writes down how far it has come, and leaves if it has been told to stop."""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from peftune.errors import EXIT_PREEMPTED, Fault, Preempted
from peftune.loop.checkpoint import folder_of, save_checkpoint
from peftune.loop.publish import write_json
from peftune.loop.run import Run
from peftune.loop.state import TrainState

STOPPED = "stopped.json"
"""File of the run folder: the run was pre-empted and can go on. It lies there until it does."""


def save(run: Run, state: TrainState) -> None:
    """Checkpoint `state`; does nothing if this step is on disk already."""
    started = time.perf_counter()
    if save_checkpoint(run.folder, replace(state, rows=run.journal.rows), run.strategy.unwrap(run.model),
                       run.optimizer, run.strategy, config_yaml=run.config_yaml, keep=run.keep_checkpoints):
        run.stop.saved_in(time.perf_counter() - started)


def leave(run: Run, state: TrainState) -> NoReturn:
    """Checkpoint `state`, write down that the run was stopped, and end it. All ranks call it.

    Raises:
        Preempted: always; it says what is saved, and the line that goes on.
    """
    world = run.strategy.world
    why = next(filter(None, world.gather([run.stop.reason()])), "told to stop")
    save(run, state)
    checkpoint, line = folder_of(run.folder, state.step), line_that_goes_on(run)
    if world.is_main:
        write_json(run.folder / STOPPED, {
            "exit": "preempted", "exit_code": EXIT_PREEMPTED, "why": why, "step": state.step, "steps": run.steps,
            "checkpoint": str(checkpoint.relative_to(run.folder)), "go_on": line})
    raise Preempted(Fault(kind="preempted", message=f"{why}: {state.step} of {run.steps} steps are done and saved in "
                          f"{checkpoint}; exit {EXIT_PREEMPTED}\n  to go on: {line}, or the command that you used"))


def line_that_goes_on(run: Run) -> str:
    """The command that continues this run on this machine, on the same layout."""
    world = run.strategy.world
    words = ["peftune", "train", str(run.folder / "config.yaml")]
    if world.ranks > 1:
        words += ["--strategy", run.strategy.name, "--processes", str(world.ranks)]
    return shlex.join(words)


def went_on(folder: Path) -> None:
    """Take back what `leave` wrote down."""
    (folder / STOPPED).unlink(missing_ok=True)
