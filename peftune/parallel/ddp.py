"""The whole model on every rank, gradients summed (torch's DistributedDataParallel).

Annotations are evaluated here: DDP looks at those of its hook.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from peftune.parallel.pieces import Piece
from peftune.parallel.replicated import all_weights, copy_weights, trained, whole_pieces
from peftune.parallel.single import Single
from peftune.parallel.strategy import BuildOptimizer

_KEPT_UNTIL_EXIT: list[DistributedDataParallel] = []
"""torch 2.13: freeing DDP's reducer ends its gloo group while holding the interpreter's lock, and waits there for a
thread that wants the lock to free its last work: now and then a run never ended. Delete this with a torch that
releases the lock; until then the processes end without freeing it (`errors.guarded`)."""


@dataclass(frozen=True, slots=True)
class Ddp(Single):
    """As in one process on each rank, but for what the ranks exchange: gradients of trained weights, with gloo between
    CPUs and NCCL between GPUs."""

    name: str = "ddp"

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer) -> tuple[nn.Module, Optimizer]:
        device = self.world.device
        with warnings.catch_warnings():
            # torch 2.13 calls it forward_sync_buffers. Delete this, and use the new name, once that is the oldest one
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            wrapped = DistributedDataParallel(
                model.to(device), device_ids=None if device.type == "cpu" else [device.index],
                gradient_as_bucket_view=True, broadcast_buffers=_keeps_statistics(model))
        wrapped.register_comm_hook(None, _sum_gradients)
        _KEPT_UNTIL_EXIT.append(wrapped)
        return wrapped, build_optimizer(wrapped.module)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model.module if isinstance(model, DistributedDataParallel) else model

    def syncing(self, model: nn.Module, *, on: bool) -> AbstractContextManager[None]:
        return nullcontext() if on or not isinstance(model, DistributedDataParallel) else model.no_sync()

    def gather(self, model: nn.Module, *, frozen: bool) -> dict[str, Tensor]:
        return all_weights(model) if self.world.is_main else {}

    def scatter(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        copy_weights(model, weights if self.world.is_main else {})
        for parameter in trained(model).values():
            self.world.broadcast(parameter.data)

    def pieces(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Piece]:
        return whole_pieces(model, optimizer) if self.world.is_main else iter(())


def _keeps_statistics(model: nn.Module) -> bool:
    """Whether buffers change in training: running means of batch norms. All others are equal on all ranks."""
    return any(module.running_mean is not None for module in model.modules() if isinstance(module, _BatchNorm))


def _sum_gradients(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's exchange without its division by the number of ranks: our loss has its one divisor already."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
