"""A run writes down how far it has come, and leaves if it has been told to stop."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from peftune.disk import flush
from peftune.errors import EXIT_PREEMPTED, Fault, Preempted, Unwritable
from peftune.loop.checkpoint import folder_of
from peftune.loop.publish import clear_drafts, refuse_vanished, warning_of_refusal, write_json, writing
from peftune.loop.resume import resume_of
from peftune.loop.run import Run
from peftune.loop.state import TrainState
from peftune.parallel.names import preset_of, processes_words

TRY_AGAIN = "training goes on; the next checkpoint tries again, and earlier ones stay as they are"
STOPPED = "stopped.json"
"""File of the run folder: the run was pre-empted and can go on. It lies there until it does."""


def save(run: Run, state: TrainState, *, last: bool = False) -> None:
    """Checkpoint `state`, unless this step is on disk already. Where the disk refuses, say so and train on.

    Raises:
        Unwritable: the disk refuses, and this is the run's last occasion.
    """
    model = run.strategy.unwrap(run.model)
    run.strategy.world.progress.at(f"saving step {state.step}")
    try:
        run.stop.saved_in(run.saver.settle())
    except Unwritable as error:
        if not run.saver.told:
            run.journal.warn(f"{error}\n  {TRY_AGAIN}")
    try:
        run.strategy.world.on_main(lambda: _write_rows(run))
        run.stop.saved_in(run.saver.save(replace(state, rows=run.journal.rows), model, run.optimizer,
                                         wait=last or run.stop.must_measure))
    except Unwritable as error:
        if last:
            raise
        run.journal.warn(f"{error}\n  {TRY_AGAIN}")


def look_after_saving(run: Run) -> None:
    """Between steps: say that a checkpoint on its way has failed, as soon as that is known."""
    if said := run.saver.news():
        run.journal.warn(f"{said}\n  {TRY_AGAIN}")


def _write_rows(run: Run) -> None:
    """A checkpoint counts rows that must be there when it is."""
    refuse_vanished(run.folder)
    with writing(run.folder / "metrics.jsonl"):
        run.journal.flush()
        flush(run.folder / "metrics.jsonl")


def leave(run: Run, state: TrainState) -> NoReturn:
    """Checkpoint `state`, write down that the run was stopped, and end it. All ranks call it.

    Raises:
        Preempted: it says what is saved, and the line that goes on.
        Unwritable: nothing could be saved.
    """
    world = run.strategy.world
    why = next(filter(None, world.gather([run.stop.reason()])), "told to stop")
    save(run, state, last=True)
    checkpoint, line = folder_of(run.folder, state.step), line_that_goes_on(run)
    other = "" if resume_of(run.folder) == "never" else ", or the command that you used"
    if world.is_main:
        with warning_of_refusal(run.folder / STOPPED, run.journal.warn):  # the checkpoint may have filled the disk
            write_json(run.folder / STOPPED, {
                "exit": "preempted", "exit_code": EXIT_PREEMPTED, "why": why, "step": state.step, "steps": run.steps,
                "checkpoint": str(checkpoint.relative_to(run.folder)), "go_on": line})
    raise Preempted(Fault(kind="preempted", message=f"{why}: {state.step} of {run.steps} steps are done and saved in "
                          f"{checkpoint}; exit {EXIT_PREEMPTED}\n  to go on: {line}{other}"))


def line_that_goes_on(run: Run) -> str:
    """The command that continues this run on this machine, on the same layout."""
    world = run.strategy.world
    words = ["peftune", "train", str(run.folder / "config.yaml")]
    words += ["resume=auto"] if resume_of(run.folder) == "never" else []
    if world.ranks > 1:
        words += ["--strategy", preset_of(run.strategy.name)]
        words += processes_words(world.ranks, run.facts["sequence_ranks"])
    return shlex.join(words)


def tidy(folder: Path) -> None:
    """As a run begins: take back what `leave` wrote down, and delete the drafts of runs that died."""
    (folder / STOPPED).unlink(missing_ok=True)
    clear_drafts(folder)
    clear_drafts(folder / "checkpoints")
