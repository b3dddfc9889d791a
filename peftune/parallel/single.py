"""One process, one device."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftune.parallel.world import World


@dataclass(frozen=True, slots=True)
class Single:
    """The plain strategy, and the reference for all others."""

    world: World
    name: str = "single"

    def prepare(self, model: nn.Module) -> nn.Module:
        return model.to(self.world.device)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model

    def syncing(self, model: nn.Module, *, on: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self, model: nn.Module, max_norm: float | None) -> Tensor:
        return clip_local(model, max_norm)


def clip_local(model: nn.Module, max_norm: float | None) -> Tensor:
    """Clip where every rank holds all gradients. torch's own, in one pass over all tensors."""
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    return torch.nn.utils.clip_grad_norm_(trained, math.inf if max_norm is None else max_norm)
