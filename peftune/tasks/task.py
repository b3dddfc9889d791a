"""All the loop must know of a kind of learning: data and functions, no base class."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peftune.config.schema import DataConfig
from peftune.data.examples import Batch, Example
from peftune.data.findings import Doubt
from peftune.data.rows import Row
from peftune.data.targets import Targets
from peftune.errors import ConfigError, Fault
from peftune.model.outputs import logits_of
from peftune.model.reference import Reference
from peftune.numerics.intervals import interval

Record = dict[str, Any]
"""One evaluated example: position, id, prediction, reference, loss_sum, num_targets, and what the task adds."""

Metrics = dict[str, Any]
"""Metric name -> value (None where undefined), and `<name>_interval` -> [low, high] where asked for.

What `Task.metrics` gives holds `<name>_resampled` -> values [R] instead: see `with_intervals`."""

RESAMPLED = "_resampled"
"""End of the name of a metric's values in resamples."""

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "rmse"})


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """What turns text into tokens, the same for every row of a run."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    """Tokens an example is cut to: data.max_length, or what the model can read if that is less."""
    data: DataConfig
    """What is to be learned of a row, and what happens to a long one."""


def forward(model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
    """Logits, for every task that reads nothing else off the model."""
    return logits_of(model, batch.inputs)


def one_record_each(records: Sequence[Record], targets: Targets) -> list[Record]:
    """An example is a row."""
    return list(records)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A kind of learning. A further one is one file with one such value, and one line in `TASKS`."""

    name: str
    auto_class: Any
    """The transformers Auto class that carries the right output layer."""
    formats: tuple[str, ...]
    """Row formats it can learn from."""
    learn_targets: Callable[[Iterable[Row], DataConfig], Targets]
    """Training rows -> what there is to predict. Raises DataError on labels that make no task."""
    encode: Callable[[Row, Targets, TextEncoder], Sequence[Example]]
    """One row -> its examples: one, or the windows of a long text. Raises RowFault."""
    encode_prompt: Callable[[Mapping[str, Any], TextEncoder], Sequence[Example]]
    """One record without its answer -> examples to predict from. Raises RowFault."""
    forward: Callable[[nn.Module, Batch, Reference | None], Tensor] = forward
    """Model and batch -> what losses and predictions are read off, logits as a rule."""
    losses: Callable[[Tensor, Batch, Targets], Tensor]
    """Outputs -> [examples] float32: each example's loss, summed and never averaged over its targets."""
    predictions: Callable[[Tensor, Batch, Targets, Sequence[Mapping[str, Any]]], list[Record]]
    """Outputs and the examples' own records -> what each example's record says was predicted."""
    combine: Callable[[Sequence[Record], Targets], list[Record]] = one_record_each
    """Records of examples in order of position -> records of rows."""
    metrics: Callable[[Sequence[Record], Targets, bool], Metrics]
    """Records in order of position -> metrics; True adds their values in resamples of the records."""
    metric_names: Callable[[Targets], tuple[str, ...]]
    """Names that `metrics` gives for these targets, the usual one first."""
    majority: Callable[[Iterable[Record], Sequence[Record], Targets], list[Record]] | None = None
    """(training records, records to score) -> the records with what counting alone would predict."""
    doubt: Callable[[Mapping[str, Any], TextEncoder], Doubt | None] | None = None
    """Fields of a row -> why the tokens may not say what the row says; None where they do."""
    generates: bool = False
    """Predictions are generated text, not read off the logits."""
    converses: bool = False
    """Rows may be conversations, so the tokenizer needs a chat template."""
    new_head: bool = True
    """The output layer may be one that the checkpoint lacks."""
    next_token: bool = False
    """Losses are those of next tokens, which the model's own forward pass gives in place of logits."""
    pooled: bool = False
    """The output layer gives one row of logits a sequence, not one a token."""
    needs_reference: bool = False
    """The loss compares with the untrained model."""
    scores_every_row: bool = False
    """A row without a target is scored too: it cannot be learned from, but its prediction counts."""
    surveyed_as: Literal["classification", "ner", "squad", "preference", "generation"]
    """How `data/survey.py` looks at its rows."""
    scored_by: tuple[str, ...] = ()
    """Modules of libraries that `metrics` imports where it needs them: not every command scores."""

    def import_scoring(self) -> None:
        """Import what scores, before a run plans what memory is left for its steps."""
        for name in self.scored_by:
            importlib.import_module(name)


@dataclass(frozen=True, slots=True)
class BoundEncoder:
    """A task and its text encoder: the RowEncoder of `data/prepare.py`."""

    task: Task
    text: TextEncoder

    @property
    def formats(self) -> tuple[str, ...]:
        return self.task.formats

    @property
    def surveyed_as(self) -> str:
        return self.task.surveyed_as

    @property
    def max_length(self) -> int:
        return self.text.max_length

    @property
    def scores_every_row(self) -> bool:
        return self.task.scores_every_row

    def targets(self, rows: Iterable[Row], config: DataConfig) -> Targets:
        return self.task.learn_targets(rows, config)

    def doubt(self, row: Row) -> Doubt | None:
        return None if self.task.doubt is None else self.task.doubt(row.fields, self.text)

    def encode(self, row: Row, targets: Targets) -> Sequence[Example]:
        return self.task.encode(row, targets, self.text)


def chosen_metric(task: Task, targets: Targets, wanted: str | None) -> str:
    """The metric that picks the best model: the one that is wanted, else the task's usual one.

    Raises:
        ConfigError: these targets have no such metric.
    """
    names = task.metric_names(targets)
    metric = wanted or names[0]
    if metric not in names:
        raise ConfigError(Fault(kind="config", mend=f"evaluation.metric=null, or one of {', '.join(names)}",
                                message=f"evaluation.metric = {metric!r}: no metric of {targets.problem} labels"))
    return metric


def mean_loss(records: Sequence[Record]) -> float:
    """Sum of losses over sum of targets, rounded; the sum is exact, so the same for any sharding."""
    return rounded(math.fsum(r["loss_sum"] for r in records) / max(1, sum(r["num_targets"] for r in records)))


def rounded(value: float) -> float:
    """Six significant digits: beyond them, sums of float32 differ between thread counts and mean nothing."""
    return float(f"{value:.6g}")


def put(metrics: Metrics, name: str, value: float, resampled: Callable[[], np.ndarray] | None) -> None:
    """Add a metric, None where it is undefined, and its values in resamples if they are asked for."""
    metrics[name] = value if math.isfinite(value) else None
    if resampled is not None:
        metrics[f"{name}{RESAMPLED}"] = resampled()


def with_intervals(metrics: Metrics) -> Metrics:
    """Metrics with the 95 % interval in place of the resampled values it is read off; None where it is undefined."""
    result: Metrics = {}
    for name, value in metrics.items():
        if name.endswith(RESAMPLED):
            low, high = interval(value)
            result[f"{name.removesuffix(RESAMPLED)}_interval"] = [low, high] if math.isfinite(low + high) else None
        else:
            result[name] = value
    return result


def better(metric: str, value: float | None, best: float | None) -> bool:
    """Whether `value` improves on `best`; an undefined value never does."""
    if value is None:
        return False
    if best is None:
        return True
    return value < best if metric in LOWER_IS_BETTER else value > best
