"""In which type weights are kept and products are computed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peftune.config.schema import ModelConfig
from peftune.numerics.products import lacks_bfloat16, multiply_in_float32

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def weight_dtype(config: ModelConfig, *, adapted: bool) -> torch.dtype:
    """Type to load weights in: the frozen ones' own; float32 where all are trained, unless pure_bf16."""
    return DTYPES[config.dtype] if adapted or config.pure_bf16 else torch.float32


def keep_trainable_in_float32(model: nn.Module, config: ModelConfig) -> None:
    """Widen trainable weights, so that small updates are not rounded away. pure_bf16 leaves them."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point() and not config.pure_bf16:
            parameter.data = parameter.data.float()


def uses_autocast(config: ModelConfig) -> bool:
    """Whether products are computed in bfloat16 over float32 trainable weights."""
    return config.dtype == "bfloat16" and not config.pure_bf16


def choose_products(dtype: str, device: torch.device) -> None:
    """CPUs without instructions for bfloat16 multiply it in float32 from now on, in this process."""
    if dtype == "bfloat16" and device.type == "cpu" and lacks_bfloat16():
        multiply_in_float32()


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether a GPU is older than bfloat16 (before Ampere): torch computes it all the same, and slowly."""
    return device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(config: ModelConfig, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """A context for every forward pass: products in bfloat16 over float32 trainable weights, or nothing. They are taken
    as `choose_products` says."""
    choose_products(config.dtype, device)
    if not uses_autocast(config):
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def enable_gradient_checkpointing(model: PreTrainedModel) -> bool:
    """Recompute each layer's activations in backward; False where the model's code cannot. Non-reentrant, so frozen
    embeddings need no gradient hook, with which transformers would compute gradients down to them through every frozen
    layer."""
    if not model.supports_gradient_checkpointing:
        return False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()
    return True


def disable_gradient_checkpointing(model: nn.Module) -> None:
    """Keep each layer's activations again, if they were recomputed."""
    recomputing: list[Any] = [m for m in model.modules() if vars(m).get("gradient_checkpointing")]
    for module in recomputing:
        module.gradient_checkpointing = False
