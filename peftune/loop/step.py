"""One optimizer step, whatever the task, the method, the strategy and the micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from peftune.data.examples import Batch
from peftune.parallel.strategy import Strategy


@dataclass(frozen=True, slots=True)
class StepWork:
    """What all ranks together do in a step, and this rank's part of it."""

    micro_batches: Iterable[Batch]
    micro_batch_count: int
    examples: int
    """Over all ranks, as are tokens and targets."""
    tokens: int
    targets: int
    ids: Callable[[], list[str]]
    """Names of the step's examples, for messages."""


@dataclass(frozen=True, slots=True)
class StepStats:
    """What a step did."""

    loss_sum: float
    """Loss of the step before division, over all ranks."""
    examples: int
    tokens: int
    targets: int
    grad_norm: float
    stop: bool
    """Some rank was asked to stop: all of them know it now."""

    @property
    def finite(self) -> bool:
        """Whether loss and gradient were numbers. If not, no weight was changed."""
        return math.isfinite(self.loss_sum) and math.isfinite(self.grad_norm)


def train_step(
    model: nn.Module, work: StepWork, optimizer: Optimizer, strategy: Strategy, *,
    losses: Callable[[nn.Module, Batch], torch.Tensor], autocast: Callable[[], AbstractContextManager[None]],
    max_grad_norm: float | None, inspect: Callable[[nn.Module], None] | None = None, stop: bool = False,
) -> StepStats:
    """Take one optimizer step on the mean loss over every target of every rank and micro-batch.

    Dividing by the global target count makes the gradient independent of how targets fall into
    micro-batches and ranks. Undoing its own averaging is the strategy's affair.

    Where the loss or the gradient is not finite, on whichever rank, the step is left out: all ranks see the same sums,
    so all of them drop their gradients and keep their weights.

    Args:
        model: as the strategy prepared it.
        work: the step's examples.
        optimizer: over the trainable weights.
        strategy: how devices work together.
        losses: model and batch -> [B] float32, summed over each example's targets.
        autocast: the precision of the forward pass.
        max_grad_norm: bound on the global gradient norm, or None.
        inspect: called with the gradients in place, before the weights change.
        stop: this rank was asked to stop; the ranks tell each other beside the loss.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=strategy.world.device)
    for i, batch in enumerate(work.micro_batches):
        with strategy.syncing(model, on=i == work.micro_batch_count - 1):
            with autocast():
                part = losses(model, batch).sum()
            strategy.backward(model, part / work.targets)
        loss_sum += part.detach()
    grad_norm = strategy.clip(model, max_grad_norm)
    asked = loss_sum.new_tensor(float(stop))
    sums = [*strategy.world.sum(torch.stack([loss_sum, asked])), grad_norm.to(loss_sum)]
    total, stops, norm = torch.stack(sums).tolist()  # all sums in one wait for the device
    stats = StepStats(total, work.examples, work.tokens, work.targets, norm, stop=stops > 0)
    if not stats.finite:
        strategy.skip(model, optimizer)
        return stats
    if inspect is not None:
        inspect(model)
    strategy.apply(model, optimizer)
    return stats
