"""Optimizer state (ZeRO-1), gradients (2) and weights (3) divided among the ranks, by DeepSpeed.

Source: Rajbhandari et al., 2020, arXiv:1910.02054. Some of what is needed here DeepSpeed 0.19 keeps in attributes it
does not document; they are named in this file alone, and pyproject pins the version.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftune.errors import Fault, MachineError
from peftune.parallel.extensions import refuse_abandoned_builds
from peftune.parallel.pieces import Piece, whole
from peftune.parallel.replicated import (
    STATE_NAMES,
    all_weights,
    copy_weights,
    saved_buffers,
    saved_weight,
    trained,
)
from peftune.parallel.strategy import BuildOptimizer, ReadWhole
from peftune.parallel.world import World
from peftune.parallel.zero_config import filled, offloads, read_zero_config, stage_of
from peftune.parallel.zero_parts import Reached, Share


@dataclass(frozen=True, slots=True)
class Zero:
    """One of DeepSpeed's stages; the engine does the exchange, the loop owns the step."""

    world: World
    config: dict[str, Any]
    """From `read_zero_config`."""
    bfloat16: bool
    """Products in bfloat16 over float32 trainable weights: the engine must be told."""
    _engines: list[Any] = field(default_factory=list)
    """The engine that trains, then those of frozen models: their hooks live as long as they do."""
    _reached: set[int] = field(default_factory=set)
    """Trained weights that a gradient has reached."""
    _norm: list[Tensor] = field(default_factory=list)
    """Of the step's gradient."""

    @property
    def stage(self) -> int:
        return stage_of(self.config)

    @property
    def name(self) -> str:
        return f"zero{self.stage}" + ("-offload" if offloads(self.config) else "")

    @property
    def lockstep(self) -> bool:
        return self.stage == 3

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer) -> tuple[nn.Module, Optimizer]:
        deepspeed = import_deepspeed(self.world)
        config = self._filled(model)
        ours = build_optimizer(model)  # while weights have their shapes, which say what decays
        if self.stage == 3:
            self._divide(model, config)
        else:
            model.to(self.world.device)
        for parameter in trained(model).values():
            parameter.register_hook(Reached(self._reached, id(parameter)))
        engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=ours, config=config)
        self._engines.append(engine)
        return engine, optimizer

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        if self.stage < 3:
            return model.to(self.world.device)
        config = self._filled(model)
        self._divide(model, config)
        self._engines.append(import_deepspeed(self.world).initialize(model=model, config=config)[0])
        return model

    def _filled(self, model: nn.Module) -> dict[str, Any]:
        return filled(self.config, ranks=self.world.ranks, weights=sum(p.numel() for p in model.parameters()),
                      on_cpu=self.world.device.type == "cpu", bfloat16=self.bfloat16)

    def _divide(self, model: nn.Module, config: dict[str, Any]) -> None:
        """Weight after weight, so that the whole model is never on one device."""
        import_deepspeed(self.world).zero.Init(module=model, config_dict_or_path=config)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model.module if model is self._engine else model

    @property
    def _engine(self) -> Any:
        return self._engines[0]

    def syncing(self, model: nn.Module, *, on: bool) -> AbstractContextManager[None]:
        self._engine.set_gradient_accumulation_boundary(on)
        return nullcontext()

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        """DeepSpeed divides gradients by the number of ranks; our loss has its one divisor already."""
        self._engine.backward(loss * self.world.ranks, scale_wrt_gas=False)

    def clip(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """The engine scales the gradients while it applies them; here it is told the bound, and asked the norm."""
        optimizer = self._engine.optimizer
        optimizer.clip_grad = max_norm or 0.0
        if self.stage == 3:
            groups = torch.stack([torch.as_tensor(norm).float() for norm in optimizer._get_norm_groups()])
            norm = torch.linalg.vector_norm(torch.where(groups < 0, torch.inf, groups))
        else:
            optimizer._wait_for_offload_copies()
            norm = torch.as_tensor(optimizer.scaled_global_norm()).float()
        self._norm[:] = [torch.where(norm < 0, torch.inf, norm)]  # DeepSpeed says -1 for a norm that is not finite
        return self._norm[0]

    def apply(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._engine.step()
        assert self._engine.was_step_applied(), "DeepSpeed skipped a step whose gradient norm is finite"

    def skip(self, model: nn.Module, optimizer: Optimizer) -> None:
        """DeepSpeed drops gradients without a step where their norm is not finite, and has no other verb for it.

        So it is told such a norm: a loss may be infinite while its gradient is not.
        """
        inner = self._engine.optimizer
        told = {"_get_norm_groups": lambda: [torch.tensor(math.inf)]} if self.stage == 3 else {
            "scaled_global_norm": lambda: torch.tensor(math.inf)}
        vars(inner).update(told)
        try:
            self._engine.step()
        finally:
            for name in told:
                del vars(inner)[name]
        assert not self._engine.was_step_applied(), "DeepSpeed took a step that was to be skipped"

    def weight(self, parameter: nn.Parameter) -> Tensor:
        if self.stage < 3:
            return parameter
        part = _partition(parameter)
        return part[:self._own_values(parameter, part.numel())]  # nobody writes what fills the last part up

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        from deepspeed.utils import safe_get_full_grad, safe_get_local_grad

        if id(parameter) not in self._reached:
            return None
        found = safe_get_local_grad(parameter) if self.stage == 3 else safe_get_full_grad(parameter)
        bound = self._engine.optimizer.clip_grad or math.inf
        return None if found is None else found * (bound / self._norm[0].to(found.device)).clamp(max=1.0)

    def gather(self, model: nn.Module, *, frozen: bool) -> dict[str, Tensor]:
        if self.stage < 3:
            return all_weights(model) if self.world.is_main else {}
        found = {}
        for name, parameter in (dict(model.named_parameters()) if frozen else trained(model)).items():
            with _gathered(parameter, None):
                if self.world.is_main:
                    found[name] = parameter.detach().to("cpu", copy=True)
        return found | saved_buffers(model) if self.world.is_main else {}

    @torch.no_grad()
    def scatter(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        if self.stage < 3:
            copy_weights(model, weights if self.world.is_main else {})
        for name, parameter in trained(model).items():
            if self.stage < 3:
                self.world.broadcast(parameter.data)
            else:
                with _gathered(parameter, 0):
                    if self.world.is_main:
                        parameter.copy_(weights[name])
            self._masters_from(parameter)

    def _masters_from(self, parameter: nn.Parameter) -> None:
        """The optimizer's own copy of this rank's part, from the weight."""
        share = self._share(parameter)
        if share is not None:
            share.of(share.flat).copy_(share.of_whole(
                _partition(parameter) if self.stage == 3 else parameter.flatten(), divided=self.stage == 3))

    def pieces(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Piece]:
        for name, parameter in trained(model).items():
            share = self._share(parameter)
            if share is None:
                continue
            yield Piece(name, share.of(share.flat), share.begin, share.shape)
            for key, value in self._base_state(share).items():
                if value is None:
                    continue
                if torch.is_tensor(value) and value.shape == share.flat.shape:
                    yield Piece(f"{name}|{key}", share.of(value), share.begin, share.shape)
                else:
                    yield whole(f"{name}|{key}", torch.as_tensor(value))

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizer: Optimizer, read: ReadWhole) -> None:
        # every rank reads them all, so that all of them or none find one missing
        self.scatter(model, {name: saved_weight(name, self._shape(parameter), read)
                             for name, parameter in trained(model).items()})
        base = self._engine.optimizer.optimizer
        for name, parameter in trained(model).items():
            share = self._share(parameter)
            for key in STATE_NAMES if share is not None else ():
                value = read(f"{name}|{key}")
                if value is None or share is None:
                    continue
                state = self._base_state(share)
                if tuple(value.shape) != share.shape:
                    state[key] = step_count(value, share.flat, fused=bool(base.defaults.get("fused")))
                else:
                    if key not in state:
                        state[key] = torch.zeros_like(share.flat)
                    share.of(state[key]).copy_(share.of_whole(value.flatten(), divided=False))

    def _shape(self, parameter: Any) -> tuple[int, ...]:
        """Of the whole weight: a ZeRO-3 weight has no values between its uses."""
        return tuple(parameter.ds_shape if self.stage == 3 else parameter.shape)

    def _base_state(self, share: Share) -> dict[str, Any]:
        return self._engine.optimizer.optimizer.state[share.flat]

    def _own_values(self, parameter: Any, size: int) -> int:
        """How many of this rank's `size` values of a ZeRO-3 weight are the weight's: the last part is filled up."""
        return max(0, min(size, parameter.ds_numel - self.world.rank * size))

    def _share(self, parameter: Any) -> Share | None:
        """Where this rank's part of a trained weight lies; None if it has none."""
        optimizer = self._engine.optimizer
        if self.stage == 3:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            own = self._own_values(parameter, size)
            flat = optimizer.fp32_partitioned_groups_flat[group]
            return Share(flat, int(offset), own, self.world.rank * size, self._shape(parameter)) if own else None
        link = parameter._hp_mapping
        if link is None:
            return None
        return Share(optimizer.single_partition_of_fp32_groups[link.param_group_index],
                      link.hp_fragment_address.start, link.hp_fragment_address.numel,
                      link.lp_fragment_address.start, tuple(parameter.shape))


def step_count(value: Tensor, flat: Tensor, *, fused: bool) -> Tensor:
    """A saved count of steps where torch's AdamW looks for it: its fused kernel reads the weights' own device, and does
    not ask whether the count lies there."""
    return value.to(flat.device, torch.float32) if fused else value


def import_deepspeed(world: World) -> Any:
    """DeepSpeed, told which device it is for.

    Raises:
        MachineError: it is not installed.
    """
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for GPUs, and guesses
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    try:
        import deepspeed
    except ImportError:
        raise MachineError(Fault(kind="environment", message="this strategy needs deepspeed, which is not installed",
                                 mend='pip install "peftune[deepspeed]", or --strategy ddp')) from None
    return deepspeed


def open_zero(world: World, *, bfloat16: bool) -> Zero:
    """The strategy that the launcher's environment describes.

    Raises:
        MachineError: DeepSpeed is not installed, or waits for a build that nobody makes.
        ConfigError: the DeepSpeed JSON decides what the run's config decides, or names no stage of ZeRO.
    """
    world.on_main(refuse_abandoned_builds)
    import_deepspeed(world).init_distributed(dist_backend=world.backend, auto_mpi_discovery=False)
    config = world.on_main(read_zero_config)
    if stage_of(config) not in (1, 2, 3):
        raise MachineError(Fault(kind="environment", message=f"ZeRO stage {stage_of(config)} divides nothing",
                                 mend="launch/accelerate/zero1.yaml, zero2.yaml or zero3.yaml, or ddp.yaml"))
    return Zero(world, config, bfloat16)


def _gathered(parameter: nn.Parameter, writer: int | None) -> AbstractContextManager[None]:
    import deepspeed

    gather: Callable[..., AbstractContextManager[None]] = deepspeed.zero.GatheredParameters
    return gather([parameter], modifier_rank=writer)


def _partition(parameter: Any) -> Tensor:
    """This rank's part of a ZeRO-3 weight, filled up to equal size, [ceil(numel / ranks)]."""
    return parameter.ds_tensor

