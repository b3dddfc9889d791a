"""The model before training, as a fixed point that preference training is tied to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peftune.model.outputs import logits_of

Reference = Callable[[dict[str, Any]], Tensor]
"""Inputs of a batch -> logits of the model that is not trained, without gradients."""


def frozen_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model as it is now, in `dtype`, apart from the one that trains. An adapter makes it needless."""
    return copy.deepcopy(model).to(dtype).requires_grad_(False).eval()


def reference_of(model: nn.Module) -> Reference:
    """Logits of a model with its adapter off, which takes no memory; or of a model that does not train."""
    if isinstance(model, PeftModel):
        return lambda inputs: _without_adapter(model, inputs)
    return lambda inputs: _forward(model, inputs)


def _without_adapter(model: PeftModel, inputs: dict[str, Any]) -> Tensor:
    was_training = model.training
    model.eval()
    with model.disable_adapter():
        logits = _forward(model, inputs)
    model.train(was_training)
    return logits


@torch.no_grad()
def _forward(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return logits_of(model, inputs)
