"""Weights, gradients and optimizer state divided among the ranks by rows (torch's fully_shard, FSDP2).

Each transformer layer is gathered when it computes and dropped after it. Nothing but trainable weights has gradients
to exchange, so the frozen base costs its gathering and no more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from peftune.errors import Fault, MachineError
from peftune.parallel.pieces import Piece, whole
from peftune.parallel.replicated import (
    apply_gradients,
    clip_gradients,
    drop_gradients,
    restore_whole,
    saved_buffers,
    trained,
)
from peftune.parallel.strategy import BuildOptimizer, ReadWhole
from peftune.parallel.world import World


@dataclass(frozen=True, slots=True)
class Fsdp2:
    """gloo between CPUs, NCCL between GPUs."""

    world: World
    offload: bool = False
    """Keep the rank's shards in host memory, and copy each layer to the GPU when it computes."""
    name: str = "fsdp2"
    lockstep: bool = True

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer) -> tuple[nn.Module, Optimizer]:
        if not all(parameter.requires_grad for parameter in model.parameters()):
            self._equalise(model)
        self._shard(model)
        return model, build_optimizer(model)

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        self._shard(model)
        return model

    @torch.no_grad()
    def _equalise(self, model: nn.Module) -> None:
        """Take the main process's adapter. One that starts from a decomposition of weights or data is rounded otherwise
        on machines of another kind, and may be turned: a start put together from parts of several is none. All other
        weights come from a file or from the seed."""
        for tensor in (*trained(model).values(), *model.buffers()):
            there = tensor.detach().to(self.world.device).contiguous()
            self.world.broadcast(there)
            tensor.copy_(there)

    def _shard(self, model: nn.Module) -> None:
        device = self.world.device.type
        mesh = init_device_mesh(device, (self.world.ranks,))
        policy = CPUOffloadPolicy() if self.offload and device != "cpu" else OffloadPolicy()
        for block in blocks(model):
            fully_shard(block, mesh=mesh, offload_policy=policy)
        fully_shard(model, mesh=mesh, offload_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # sums, not means: our loss has its one divisor already. gloo has no scaled sum of its own
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        if "generate" in dir(model):
            register_fsdp_forward_method(model, "generate")

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The same model, its weights divided: after a forward pass those outside the layers may lie there whole."""
        if isinstance(model, FSDPModule):
            model.reshard()
        return model

    def syncing(self, model: nn.Module, *, on: bool) -> AbstractContextManager[None]:
        """Every micro-batch is reduced: gradients waiting for the last one would each be whole on each rank."""
        return nullcontext()

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        loss.backward()

    def clip(self, model: nn.Module, max_norm: float | None) -> Tensor:
        norm = clip_gradients(model, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def apply(self, model: nn.Module, optimizer: Optimizer) -> None:
        apply_gradients(optimizer)

    def skip(self, model: nn.Module, optimizer: Optimizer) -> None:
        drop_gradients(optimizer)

    def weight(self, parameter: nn.Parameter) -> Tensor:
        return _local(parameter)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return None if parameter.grad is None else _local(parameter.grad)

    @torch.no_grad()
    def gather(self, model: nn.Module, *, frozen: bool) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        plain = self.unwrap(model)
        for name, parameter in (dict(plain.named_parameters()) if frozen else trained(plain)).items():
            tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
            if self.world.is_main:
                found[name] = tensor.cpu()
        return found | saved_buffers(model) if self.world.is_main else {}

    @torch.no_grad()
    def scatter(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in trained(self.unwrap(model)).items():
            tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.world.device)
            if self.world.is_main:
                tensor.copy_(weights[name])
            self.world.broadcast(tensor)
            parameter.copy_(_as_placed(tensor, parameter))

    def pieces(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Piece]:
        for name, parameter in trained(self.unwrap(model)).items():
            yield from self._own(name, parameter)
            for key, value in optimizer.state.get(parameter, {}).items():
                if value is not None:
                    yield from self._own(f"{name}|{key}", torch.as_tensor(value))

    def _own(self, name: str, tensor: Tensor) -> Iterator[Piece]:
        if not isinstance(tensor, DTensor):
            if self.world.is_main:
                yield whole(name, tensor)
            return
        local = tensor.to_local()
        rows = -(-tensor.shape[0] // self.world.ranks)  # torch.chunk's rule: equal parts, the last ones short or empty
        begin = min(rows * self.world.rank, tensor.shape[0])
        if local.numel():
            yield Piece(name, local.detach().flatten(), begin * prod(tensor.shape[1:]), tuple(tensor.shape))

    def restore(self, model: nn.Module, optimizer: Optimizer, read: ReadWhole) -> None:
        restore_whole(self.unwrap(model), optimizer, read, _as_placed)


def open_fsdp2(world: World) -> Fsdp2:
    """The strategy that the launcher's environment describes.

    Raises:
        MachineError: FSDP 1 is asked for.
    """
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise MachineError(Fault(kind="environment", message="FSDP 1 is asked for, and peftune has FSDP 2",
                                 mend="fsdp_version: 2 in the fsdp_config, as in launch/accelerate/fsdp2.yaml"))
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # transformers would leave new heads empty on ranks but 0
    return Fsdp2(world, offload=os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true")


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers that are gathered one at a time: those that the model's authors say must not be split.

    Innermost first, as fully_shard wants them. None are found where a family names none; the model is one unit then.
    """
    names = {name for module in model.modules() if isinstance(module, PreTrainedModel)
             for name in module._no_split_modules or ()}
    return [module for module in model.modules() if type(module).__name__ in names][::-1]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as_placed(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """A whole tensor, equal on all ranks, divided as `parameter` is. No exchange."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh: DeviceMesh = parameter.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
