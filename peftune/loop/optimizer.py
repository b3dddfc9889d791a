"""Optimizers over the trainable weights, and their learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from peftune.config.schema import TrainConfig

ADAM_BETAS = (0.9, 0.999)
SGD_MOMENTUM = 0.9


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer of `train.optimizer`; decay spares biases and norms (tensors of one dimension)."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for _, p in named if p.ndim > 1]
    spared = [p for _, p in named if p.ndim <= 1]
    groups = [{"params": params, "weight_decay": decay}
              for params, decay in ((decayed, config.weight_decay), (spared, 0.0)) if params]
    if config.optimizer == "sgd":
        return SGD(groups, lr=config.learning_rate, momentum=SGD_MOMENTUM)
    return AdamW(groups, lr=config.learning_rate, betas=ADAM_BETAS, fused=_can_fuse(p for _, p in named))


def _can_fuse(parameters: Iterable[nn.Parameter]) -> bool:
    """torch's one-kernel AdamW exists for floating-point weights on these devices."""
    return all(p.is_floating_point() and p.device.type in ("cuda", "cpu", "mps", "xpu") for p in parameters)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """The same rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimizer's state as named tensors: `<weight name>|<state name>`."""
    return {f"{name}|{key}": value for name, key, value in _entries(optimizer, model)}


def _entries(optimizer: Optimizer, model: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                yield name, key, torch.as_tensor(value)


def load_optimizer_tensors(optimizer: Optimizer, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, through the optimizer's own loading (types, devices)."""
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, _, state = key.rpartition("|")
        by_name.setdefault(name, {})[state] = value
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state_dict = optimizer.state_dict()
    live = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state_dict["state"] = {i: by_name[names[id(p)]] for i, p in enumerate(live) if names[id(p)] in by_name}
    optimizer.load_state_dict(state_dict)
