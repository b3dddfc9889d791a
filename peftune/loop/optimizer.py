"""Optimizers over the trainable weights, and their learning rate."""

from __future__ import annotations

from collections.abc import Iterable

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
