"""One process, one device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from peftune.parallel.pieces import Piece
from peftune.parallel.replicated import (
    all_weights,
    apply_gradients,
    clip_gradients,
    copy_weights,
    drop_gradients,
    restore_whole,
    whole_pieces,
)
from peftune.parallel.strategy import BuildOptimizer, ReadWhole
from peftune.parallel.world import World


@dataclass(frozen=True, slots=True)
class Single:
    """The plain strategy, and the reference for all others."""

    world: World
    name: str = "single"
    lockstep: bool = False

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer) -> tuple[nn.Module, Optimizer]:
        model = model.to(self.world.device)
        return model, build_optimizer(model)

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        return model.to(self.world.device)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model

    def syncing(self, model: nn.Module, *, on: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        loss.backward()

    def clip(self, model: nn.Module, max_norm: float | None) -> Tensor:
        return clip_gradients(model, max_norm)

    def apply(self, model: nn.Module, optimizer: Optimizer) -> None:
        apply_gradients(optimizer)

    def skip(self, model: nn.Module, optimizer: Optimizer) -> None:
        drop_gradients(optimizer)

    def weight(self, parameter: nn.Parameter) -> Tensor:
        return parameter

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return parameter.grad

    def gather(self, model: nn.Module, *, frozen: bool) -> dict[str, Tensor]:
        return all_weights(model)

    def scatter(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        copy_weights(model, weights)

    def pieces(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Piece]:
        return whole_pieces(model, optimizer)

    def restore(self, model: nn.Module, optimizer: Optimizer, read: ReadWhole) -> None:
        restore_whole(model, optimizer, read)
