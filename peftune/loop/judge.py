"""Evaluations while training: is this the best model so far, and is it time to stop?"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from peftune.errors import ConfigError, Fault, Unwritable
from peftune.loop.evaluate import Scored, evaluate
from peftune.loop.publish import published, refuse_vanished
from peftune.loop.resume import write_step
from peftune.loop.run import Run
from peftune.loop.saving import leave
from peftune.loop.self_check import check_weights
from peftune.loop.state import TrainState
from peftune.model.adapters import has_adapter
from peftune.parallel.stop import StopAgreed
from peftune.tasks.task import better


def evaluate_and_judge(run: Run, state: TrainState) -> TrainState:
    """Score the validation split, if there is one, and judge the outcome.

    Raises:
        Preempted: the ranks have agreed to stop; the next start does the evaluation again.
    """
    if "validation" not in run.data.splits:
        return replace(state, evaluation_owed=False)
    try:
        scored = evaluate(run.evaluator, run.strategy.unwrap(run.model), run.data.splits["validation"],
                          name="validation", generate=run.generate_every_time)
    except StopAgreed:
        leave(run, state)
    return judge(run, replace(state, evaluation_owed=False), scored)


def judge(run: Run, state: TrainState, scored: Scored) -> TrainState:
    """Log an evaluation; keep the model as `best` if it is better, count towards patience if not."""
    require_metric(run.metric, scored)
    run.journal.evaluation_row(state, "validation", scored.metrics, epoch=run.epochs_of(state.step))
    value = scored.metrics.get(run.metric)
    if better(run.metric, value, state.best_value) or state.best_step is None:
        run.strategy.world.progress.at("keeping the best weights")
        model = run.strategy.unwrap(run.model)
        check_weights(model, run.strategy)
        weights = run.strategy.gather(model, frozen=not has_adapter(model))
        try:
            run.strategy.world.on_main(lambda: _publish_best(run, model, weights, state.step))
        except Unwritable as error:
            run.journal.warn(f"{error}\n  training goes on; best/ stays, for the next better model to replace")
            return replace(state, evaluations_since_best=0)
        return replace(state, best_value=value, best_step=state.step, evaluations_since_best=0)
    waited = state.evaluations_since_best + 1
    stop = run.patience is not None and waited >= run.patience
    return replace(state, evaluations_since_best=waited, stopped_early=stop)


def require_metric(metric: str, scored: Scored) -> None:
    """Raise ConfigError if the metric that picks the best is none of these rows': it would pick the first for ever."""
    if metric not in scored.metrics:
        raise ConfigError(Fault(
            kind="config", mend="evaluation.metric=null, or loss",
            message=f"evaluation.metric = {metric!r}: the validation rows hold no prompts, and give none"))


def _publish_best(run: Run, model: nn.Module, weights: dict[str, Tensor], step: int) -> None:
    refuse_vanished(run.folder)
    with published(run.folder / "best") as draft:
        run.publish(model, weights, draft)
        write_step(draft, step)
