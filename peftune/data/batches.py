"""The deterministic batch plan: which examples step t sees, a pure function of (data, seed, batch_size)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from peftune.errors import DataError, Fault
from peftune.numerics.dealing import Grouping, padded_groups, rank_groups


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Steps over a training split. Any step can be asked for, in any order, on any rank."""

    lengths: np.ndarray
    """Tokens of each example, int [n]."""
    source: np.ndarray
    """Source of each example, int [n]."""
    weights: tuple[float, ...]
    """How often the rows of each source are seen in an epoch."""
    batch_size: int
    seed: int
    examples_per_epoch: int = field(init=False, compare=False)
    """Examples of one epoch; with all weights 1, the size of the split."""
    _orders: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The order of the epoch at hand, so that it is not computed at each step."""

    def __post_init__(self) -> None:
        """Count an epoch once: at each step it would cost a pass over the split."""
        counts = np.bincount(self.source, minlength=len(self.weights))
        examples = sum(round(weight * int(count)) for weight, count in zip(self.weights, counts, strict=True))
        if not examples:
            raise DataError(Fault(
                kind="data", message=f"{int(counts.sum()):,} examples, times the weights of their sources in "
                "data.train, are none in an epoch", mend="raise a weight, or give more rows"))
        object.__setattr__(self, "examples_per_epoch", examples)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last may be smaller, so that each example is seen once."""
        return math.ceil(self.examples_per_epoch / self.batch_size)

    def steps(self, epochs: float, most: int | None) -> int:
        """Optimizer steps of a run: `most` of them if given, else those of so many epochs, at least one."""
        return most or max(1, round(epochs * self.steps_per_epoch))

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Positions in the order of one epoch, int64 [examples_per_epoch]."""
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        chosen = []
        for number, weight in enumerate(self.weights):
            rows = np.flatnonzero(self.source == number)
            wanted = round(weight * len(rows))
            whole, rest = divmod(wanted, len(rows)) if len(rows) else (0, 0)
            chosen += [rows] * whole + [generator.permutation(rows)[:rest]]
        return generator.permutation(np.concatenate(chosen))

    def step(self, step: int) -> np.ndarray:
        """Positions of the examples of optimizer step `step` (from 0), int64 [<= batch_size]."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = self.epoch_order(epoch)
        return self._orders[epoch][within * self.batch_size : (within + 1) * self.batch_size]

    def micro_batches(
        self, step: int, *, rank: int, ranks: int, budget_tokens: int, grouping: Grouping = padded_groups
    ) -> list[list[int]]:
        """Positions of each micro-batch of one rank. As many for each rank; a short rank's last ones are empty."""
        positions = self.step(step)
        groups = rank_groups(self.lengths[positions].tolist(), ranks, budget_tokens, grouping)[rank]
        return [[int(positions[i]) for i in group] for group in groups]


def evaluation_batches(
    lengths: Sequence[int], *, rank: int, ranks: int, budget_tokens: int, grouping: Grouping = padded_groups
) -> list[list[int]]:
    """Whole batches of an evaluation dealt to one rank, each example in exactly one batch of one rank.

    The batches themselves do not depend on the ranks, so an example meets the same padding, and its
    scores the same rounding, however many processes share the work.
    """
    return grouping(lengths, budget_tokens)[rank::ranks]
