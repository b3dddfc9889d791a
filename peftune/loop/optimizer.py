"""Optimizers over the trainable weights, and their learning rates."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from peftune.config.schema import TrainConfig
from peftune.model.optimizer_8bit import adamw_8bit

ADAM_BETAS = (0.9, 0.999)
SGD_MOMENTUM = 0.9
RATE_FACTOR = "rate_factor"
"""Key in a parameter group: its learning rate as a multiple of the schedule's."""


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer of `train.optimizer`; decay spares biases and norms (tensors of one dimension).

    With `lora_plus_ratio`, the matrices B of LoRA learn that many times faster than everything else.

    Source: LoRA+, Hayou et al., 2024, arXiv:2402.12354: with one rate for both, either A or B learns inefficiently in
    wide models.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    kinds: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        factor = config.lora_plus_ratio or 1.0 if ".lora_B." in name else 1.0
        kinds.setdefault((decay, factor), []).append(parameter)
    groups = [{"params": params, "weight_decay": decay, RATE_FACTOR: factor, "lr": config.learning_rate * factor}
              for (decay, factor), params in kinds.items()]
    if config.optimizer == "sgd":
        return SGD(groups, lr=config.learning_rate, momentum=SGD_MOMENTUM)
    if config.optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        return adamw_8bit(groups, lr=config.learning_rate, betas=ADAM_BETAS,
                          paged=config.optimizer == "paged_adamw_8bit")
    return AdamW(groups, lr=config.learning_rate, betas=ADAM_BETAS, fused=_can_fuse(p for _, p in named))


def _can_fuse(parameters: Iterable[nn.Parameter]) -> bool:
    """torch's one-kernel AdamW exists for floating-point weights on these devices."""
    return all(p.is_floating_point() and p.device.type in ("cuda", "cpu", "mps", "xpu") for p in parameters)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """The schedule's rate, times each group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[RATE_FACTOR]
