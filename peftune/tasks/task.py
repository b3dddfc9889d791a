"""All the loop must know of a kind of learning: data and functions, no base class."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peftune.config.schema import DataConfig
from peftune.data.examples import Batch, Example
from peftune.data.prepare import Targets
from peftune.data.rows import Row

Record = dict[str, Any]
"""One evaluated example: position, id, prediction, reference, loss_sum, num_targets, and what the task adds."""

Metrics = dict[str, Any]
"""Metric name -> value (None where undefined), and `<name>_interval` -> [low, high] where asked for."""

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "rmse"})


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """What turns text into tokens, the same for every row of a run."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    """Tokens an example is cut to: data.max_length, or what the model can read if that is less."""
    supervise_all: bool = False
    """causal_lm: every token is a target, not only completions."""


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of learning. A fifth one is one file with one such value, and one line in `TASKS`."""

    name: str
    auto_class: Any
    """The transformers Auto class that carries the right output layer."""
    formats: tuple[str, ...]
    """Row formats it can learn from."""
    learn_targets: Callable[[Sequence[Row], DataConfig], Targets]
    """Training rows -> what there is to predict. Raises DataError on labels that make no task."""
    encode: Callable[[Row, Targets, TextEncoder], Example]
    """One row -> one example. Raises RowFault."""
    encode_prompt: Callable[[Mapping[str, Any], TextEncoder], Example]
    """One record without its answer -> an example to predict from. Raises RowFault."""
    losses: Callable[[Tensor, Batch, Targets], Tensor]
    """Logits -> [B] float32: each example's loss, summed and never averaged over its targets."""
    predictions: Callable[[Tensor, Targets], list[Record]]
    """Logits -> what each example's record says was predicted."""
    metrics: Callable[[Sequence[Record], Targets, bool], Metrics]
    """Records in order of position -> metrics; True adds intervals."""
    metric_names: Callable[[Targets], tuple[str, ...]]
    """Names that `metrics` gives for these targets, the usual one first."""
    majority: Callable[[Sequence[Record], Sequence[Record], Targets], list[Record]] | None = None
    """(training records, records to score) -> the records with the prediction that never reads the input."""
    generates: bool = False
    """Predictions are generated text, not read off the logits."""


@dataclass(frozen=True, slots=True)
class BoundEncoder:
    """A task and its text encoder: the RowEncoder of `data/prepare.py`."""

    task: Task
    text: TextEncoder

    @property
    def formats(self) -> tuple[str, ...]:
        return self.task.formats

    def targets(self, rows: Sequence[Row], config: DataConfig) -> Targets:
        return self.task.learn_targets(rows, config)

    def encode(self, row: Row, targets: Targets) -> Example:
        return self.task.encode(row, targets, self.text)


def mean_loss(records: Sequence[Record]) -> float:
    """Sum of losses over sum of targets, rounded; the sum is exact, so the same for any sharding."""
    return rounded(math.fsum(r["loss_sum"] for r in records) / max(1, sum(r["num_targets"] for r in records)))


def rounded(value: float) -> float:
    """Six significant digits: beyond them, sums of float32 differ between thread counts and mean nothing."""
    return float(f"{value:.6g}")


def put(metrics: Metrics, name: str, value: float, interval: Callable[[], tuple[float, float]] | None) -> None:
    """Add a metric, None where it is undefined, and its interval if one is asked for."""
    metrics[name] = value if math.isfinite(value) else None
    if interval is not None:
        low, high = interval()
        metrics[f"{name}_interval"] = [low, high] if math.isfinite(low + high) else None


def better(metric: str, value: float | None, best: float | None) -> bool:
    """Whether `value` improves on `best`; an undefined value never does."""
    if value is None:
        return False
    if best is None:
        return True
    return value < best if metric in LOWER_IS_BETTER else value > best
