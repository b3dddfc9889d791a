"""What the loop asks of a way to use several devices. The loop has no branch on which one it is."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from peftune.parallel.world import World


class Strategy(Protocol):
    """Gradients are sums over all ranks: whatever averaging an engine does, its strategy undoes."""

    @property
    def name(self) -> str:
        """As in the summary: single, ddp, ..."""
        ...

    @property
    def world(self) -> World:
        """The processes."""
        ...

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move the model to the device and wrap it for training. Weights become equal on all ranks."""
        ...

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model inside the wrapper: for saving, generating and looking at weights."""
        ...

    def syncing(self, model: nn.Module, *, on: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: gradients are exchanged only where `on`."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients."""
        ...

    def clip(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Scale the gradients of the whole model down to `max_norm`; return their 2-norm before that, [] float32."""
        ...
