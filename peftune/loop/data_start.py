"""Adapters that start from data are shown the examples of the first steps."""

from __future__ import annotations

import numpy as np
from torch import nn

from peftune.config.schema import ModelConfig
from peftune.data.batches import BatchPlan
from peftune.data.layouts import lay_out
from peftune.data.prepare import Prepared
from peftune.model.eva import start_from_data
from peftune.model.precision import autocast
from peftune.parallel.strategy import Strategy

STEPS = 8
BUDGET_TOKENS = 4096
"""Padded tokens of a forward pass."""


def start_from_planned_data(
    config: ModelConfig, model: nn.Module, data: Prepared, strategy: Strategy, *, batch_size: int, seed: int,
    pad_id: int,
) -> None:
    """Give an adapter its start from the examples that the first steps will see.

    Every rank reads the same ones and finds the same start. The model moves to the device first, unless it is to be
    divided among several: then it may not fit one.

    Raises:
        ConfigError: see `start_from_data`.
    """
    split, targets = data.splits["train"], data.targets
    device = strategy.world.device
    if strategy.lockstep:
        device = next(model.parameters()).device
    model.to(device)
    plan = BatchPlan(split.lengths, split.source, data.weights, batch_size, seed)
    groups = [group for step in range(min(STEPS, plan.steps_per_epoch)) for group in plan.micro_batches(
        step, rank=0, ranks=1, budget_tokens=max(BUDGET_TOKENS, int(np.max(split.lengths))))]
    batches = [lay_out([split[i] for i in group], group, pad_id=pad_id, kind=targets.kind, width=targets.width,
                       device=device).inputs for group in groups]
    start_from_data(model, batches, autocast=autocast(config, device))
