"""The one loop of peftune: every task, method and strategy."""

from __future__ import annotations

import time

from peftune.loop.judge import evaluate_and_judge
from peftune.loop.optimizer import set_learning_rate
from peftune.loop.run import Run
from peftune.loop.saving import leave, look_after_saving, save
from peftune.loop.self_check import SelfCheck
from peftune.loop.skipped import note_skipped
from peftune.loop.state import TrainState
from peftune.loop.step import train_step


def fit(run: Run, state: TrainState) -> TrainState:
    """Train from `state` up to `run.steps`, or until patience runs out.

    Raises:
        Preempted: a rank was told to stop; `state` as it was then is saved.
        Unwritable: the last checkpoint cannot be written; those before it are as they were.
    """
    check = SelfCheck(run.strategy.unwrap(run.model), run.optimizer, run.strategy, set_back=run.set_back)
    run.model.train()
    step_s = 0.0
    while state.evaluation_owed or (state.step < run.steps and not state.stopped_early):
        if not state.evaluation_owed:
            started = time.perf_counter()
            set_learning_rate(run.optimizer, run.learning_rate(state.step))
            stats = train_step(
                run.model, run.work(state.step), run.optimizer, run.strategy, losses=run.losses,
                autocast=run.autocast, max_grad_norm=run.max_grad_norm,
                inspect=check.gradients if check.pending else None, stop=run.stop.asked(2 * step_s),
            )
            step_s = time.perf_counter() - started
            state = state.after(stats, step_s, evaluation_owed=run.evaluation.due(state.step + 1, run.steps))
            if not stats.finite:
                note_skipped(run, state, stats)
            else:
                check.after_step()
                if run.log.due(state.step, run.steps) or state.step == run.steps:
                    run.journal.training_row(
                        state, epoch=run.epochs_of(state.step), loss=state.window_loss,
                        learning_rate=run.learning_rate(state.step - 1), grad_norm=stats.grad_norm)
                    state = state.with_empty_window()
            run.journal.progress(state.step)
            look_after_saving(run)
            if stats.stop:
                leave(run, state)
        if state.evaluation_owed:
            state = evaluate_and_judge(run, state)
        if run.checkpoint.due(state.step, run.steps) or state.stopped_early or run.stop.must_measure:
            save(run, state)
    save(run, state, last=True)
    return state
