"""How far a run has come: everything but tensors. Frozen; a step makes a new one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from peftune.loop.step import StepStats


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Written into every checkpoint as JSON."""

    step: int = 0
    """Optimizer steps done."""
    examples: int = 0
    tokens: int = 0
    """Tokens that were not padding, over all ranks."""
    supervised_tokens: int = 0
    """Targets in the loss, over all ranks."""
    seconds: float = 0.0
    """Time spent in steps, without start-up, evaluation and saving."""
    best_value: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    stopped_early: bool = False
    evaluation_owed: bool = False
    """The evaluation after this step is still to be done."""
    window_loss_sum: float = 0.0
    """Loss over the steps since the last log row, not yet written."""
    window_targets: int = 0
    skipped_steps: int = 0
    """Steps left out because their loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Of these, the last ones without another step between them."""
    rows: int = 0
    """Rows of metrics.jsonl when the checkpoint was written: what comes after them is done again."""
    baseline: dict[str, Any] = field(default_factory=dict)
    """Metrics of the untrained model by split, and of the majority guess."""

    def after(self, stats: StepStats, seconds: float, *, evaluation_owed: bool) -> TrainState:
        """The state one step later. What a skipped step saw taught nothing and counts for nothing."""
        if not stats.finite:
            return replace(self, step=self.step + 1, seconds=self.seconds + seconds, evaluation_owed=evaluation_owed,
                           skipped_steps=self.skipped_steps + 1, skipped_in_a_row=self.skipped_in_a_row + 1)
        return replace(
            self, step=self.step + 1, examples=self.examples + stats.examples, tokens=self.tokens + stats.tokens,
            supervised_tokens=self.supervised_tokens + stats.targets, seconds=self.seconds + seconds,
            window_loss_sum=self.window_loss_sum + stats.loss_sum, window_targets=self.window_targets + stats.targets,
            evaluation_owed=evaluation_owed, skipped_in_a_row=0,
        )

    @property
    def window_loss(self) -> float:
        """Mean loss over the targets since the last log row."""
        return self.window_loss_sum / max(1, self.window_targets)

    def with_empty_window(self) -> TrainState:
        """The state after a log row."""
        return replace(self, window_loss_sum=0.0, window_targets=0)

    def as_json(self) -> dict[str, Any]:
        """For state.json of a checkpoint; `TrainState(**values)` reads it."""
        return asdict(self)
