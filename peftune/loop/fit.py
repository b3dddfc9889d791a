"""The one loop of peftune: every task, method and strategy."""

from __future__ import annotations

import time
from dataclasses import replace

from peftune.loop.checkpoint import save_checkpoint
from peftune.loop.judge import evaluate_and_judge
from peftune.loop.optimizer import set_learning_rate
from peftune.loop.run import Run
from peftune.loop.self_check import SelfCheck
from peftune.loop.state import TrainState
from peftune.loop.step import train_step


def fit(run: Run, state: TrainState) -> TrainState:
    """Train from `state` up to `run.steps`, or until patience runs out."""
    check = SelfCheck(run.strategy.unwrap(run.model), run.optimizer, run.strategy, set_back=run.set_back)
    run.model.train()
    while state.step < run.steps and not state.stopped_early:
        started = time.perf_counter()
        set_learning_rate(run.optimizer, run.learning_rate(state.step))
        stats = train_step(
            run.model, run.work(state.step), run.optimizer, run.strategy, losses=run.losses, autocast=run.autocast,
            max_grad_norm=run.max_grad_norm, inspect=check.gradients if check.pending else None,
        )
        check.after_step()
        state = state.after(stats, time.perf_counter() - started)
        if run.log.due(state.step, run.steps) or state.step == run.steps:
            run.journal.training_row(
                state, epoch=run.epochs_of(state.step), loss=state.window_loss,
                learning_rate=run.learning_rate(state.step - 1), grad_norm=stats.grad_norm)
            state = state.with_empty_window()
        run.journal.progress(state.step)
        if run.evaluation.due(state.step, run.steps):
            state = evaluate_and_judge(run, state)
        if run.checkpoint.due(state.step, run.steps) or state.stopped_early:
            save(run, state)
    save(run, state)
    return state


def save(run: Run, state: TrainState) -> None:
    """Checkpoint `state`; does nothing if this step is on disk already."""
    save_checkpoint(run.folder, replace(state, rows=run.journal.rows), run.strategy.unwrap(run.model), run.optimizer,
                    run.strategy, config_yaml=run.config_yaml, keep=run.keep_checkpoints)
