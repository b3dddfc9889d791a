"""What the loop asks of a way to use several devices. The loop has no branch on which one it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from peftune.parallel.pieces import Piece
from peftune.parallel.world import World

BuildOptimizer = Callable[[nn.Module], Optimizer]
"""Model -> optimizer over its trainable weights."""
ReadWhole = Callable[[str], Tensor | None]
"""Name of a saved tensor -> all of it, on the CPU; None where there is none."""


class Strategy(Protocol):
    """Gradients are sums over all ranks: whatever averaging an engine does, its strategy undoes.

    Parameters are named as in the unwrapped model, the same under every strategy.
    """

    @property
    def name(self) -> str:
        """As in the summary: single, ddp, zero2, ..."""
        ...

    @property
    def world(self) -> World:
        """The processes."""
        ...

    @property
    def lockstep(self) -> bool:
        """Whether a forward pass is a joint act, so that all ranks must call the model equally often."""
        ...

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer) -> tuple[nn.Module, Optimizer]:
        """Move the model to the device, wrap it for training, and build its optimizer.

        Weights become equal on all ranks.
        """
        ...

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        """Place a second model that never trains, divided among the devices where the first one is."""
        ...

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model inside the wrapper: for saving, generating and looking at weights."""
        ...

    def syncing(self, model: nn.Module, *, on: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; `on` for the last one of a step."""
        ...

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        """Add the loss's gradients."""
        ...

    def clip(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Bound the gradient of the whole model by `max_norm`; return its 2-norm before that, [] float32.

        The one place that clips. No weight changes here.
        """
        ...

    def apply(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Change the weights by the gradients, and drop the gradients."""
        ...

    def skip(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Drop the gradients of a step after `clip`, and change nothing."""
        ...

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """The part of a weight that this rank holds; the whole where weights are not divided."""
        ...

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """A part of a weight's gradient between `clip` and `apply`; None if the weight took no part in the loss.

        All ranks ask for the same parameters in the same order.
        """
        ...

    def gather(self, model: nn.Module, *, frozen: bool) -> dict[str, Tensor]:
        """The unwrapped model's trained weights and its buffers, whole, by name: on the main process, empty elsewhere.
        `frozen`: its other weights too.

        All ranks call it. Tensors may share memory with the live model.
        """
        ...

    def scatter(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Put whole weights back into the unwrapped model. All ranks call it; the main process's values count."""
        ...

    def pieces(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Piece]:
        """What this rank is to save of the unwrapped model's trained weights and of the optimizer's state.

        Weights are called by their name, states `<weight name>|<state name>`. The pieces of all ranks together
        cover each tensor.
        """
        ...

    def restore(self, model: nn.Module, optimizer: Optimizer, read: ReadWhole) -> None:
        """Put saved tensors, whatever strategy saved them, into the unwrapped model and the optimizer.

        Raises:
            KeyError: a trained weight is missing, or has another shape.
        """
        ...
