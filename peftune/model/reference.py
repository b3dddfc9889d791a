"""The model before training, as a fixed point that preference training is tied to."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor, nn

Reference = Callable[[Callable[[nn.Module], Tensor]], Tensor]
"""What to read off a model -> what the model that is not trained gives, without gradients."""


def frozen_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model as it is now, in `dtype`, apart from the one that trains. An adapter makes it needless."""
    return copy.deepcopy(model).to(dtype).requires_grad_(False).eval()


def reference_of(model: nn.Module) -> Reference:
    """A model with its adapter off, which takes no memory; or a model that does not train."""
    if isinstance(model, PeftModel):
        return lambda read: _without_adapter(model, read)
    return lambda read: _forward(model, read)


def _without_adapter(model: PeftModel, read: Callable[[nn.Module], Tensor]) -> Tensor:
    was_training = model.training
    model.eval()
    with model.disable_adapter():
        found = _forward(model, read)
    model.train(was_training)
    return found


@torch.no_grad()
def _forward(model: nn.Module, read: Callable[[nn.Module], Tensor]) -> Tensor:
    return read(model)
