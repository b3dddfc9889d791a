"""The model before training, as a fixed point that preference training is tied to."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Reference = Callable[[Callable[[nn.Module], Tensor]], Tensor]
"""What to read off a model -> what the model that is not trained gives, without gradients."""


def frozen_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model as it is now, apart from the one that trains, as narrow as it can be and compute the same (see
    `narrow_products`). An adapter makes it needless."""
    return narrow_products(copy.deepcopy(model), dtype).requires_grad_(False).eval()


def narrow_products(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Round the weights that only products read, as autocast rounds them for each product: the model gives the same.
    In embeddings and norms too, `dtype` would make another residual stream."""
    read_elsewhere = {id(p) for module in model.modules() if not isinstance(module, (nn.Linear, Conv1D))
                      for p in module.parameters(recurse=False)}
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in read_elsewhere:
            module.weight.data = module.weight.data.to(dtype)
    return model


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
