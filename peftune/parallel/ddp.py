"""The whole model on every rank, gradients summed (torch's DistributedDataParallel).

Annotations are evaluated here: DDP looks at those of its hook.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from peftune.parallel.single import clip_local
from peftune.parallel.world import World

_KEPT_UNTIL_EXIT: list[DistributedDataParallel] = []
"""torch 2.13: freeing DDP's reducer ends its gloo group while holding the interpreter's lock, and waits there for a
thread that wants the lock to free its last work: now and then a run never ended. Delete this with a torch that
releases the lock; until then the processes end without freeing it (`errors.guarded`)."""


@dataclass(frozen=True, slots=True)
class Ddp:
    """gloo between CPUs, NCCL between GPUs; only trainable weights are exchanged."""

    world: World
    name: str = "ddp"

    def prepare(self, model: nn.Module) -> nn.Module:
        device = self.world.device
        wrapped = DistributedDataParallel(
            model.to(device), device_ids=None if device.type == "cpu" else [device.index], gradient_as_bucket_view=True
        )
        wrapped.register_comm_hook(None, _sum_gradients)
        _KEPT_UNTIL_EXIT.append(wrapped)
        return wrapped

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model.module if isinstance(model, DistributedDataParallel) else model

    def syncing(self, model: nn.Module, *, on: bool) -> AbstractContextManager[None]:
        return nullcontext() if on or not isinstance(model, DistributedDataParallel) else model.no_sync()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self, model: nn.Module, max_norm: float | None) -> Tensor:
        return clip_local(model, max_norm)


def _sum_gradients(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's exchange without its division by the number of ranks: our loss has its one divisor already."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])

