"""A base model with its head and adapter, in the right types: ready for a strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from peftune.config.schema import AdapterConfig, ModelConfig
from peftune.model.adapters import attach, peft_config
from peftune.model.load import Loaded, load_weights
from peftune.model.precision import keep_trainable_in_float32, weight_dtype


@dataclass(frozen=True, slots=True)
class Parameters:
    """Counts of weights."""

    total: int
    trainable: int


def assemble(
    model: ModelConfig, adapter: AdapterConfig | None, source: str, model_config: PreTrainedConfig, auto_class: Any, *,
    task: str, new_head: bool, seed: int,
) -> tuple[PreTrainedModel | PeftModel, Loaded]:
    """Load the weights, attach the adapter, set what trains. New weights depend on the seed alone.

    `new_head`: the task has an output layer that a checkpoint may lack.

    Raises:
        ModelError, ConfigError: see `load_weights`, `peft_config`, `attach`.
    """
    torch.manual_seed(seed)
    loaded = load_weights(model, source, model_config, auto_class, new_head=new_head,
                          dtype=weight_dtype(model, adapted=adapter is not None))
    if model.dropout is not None:
        for module in loaded.model.modules():
            if isinstance(module, torch.nn.Dropout):  # output layers of decoders have a rate that no config field sets
                module.p = model.dropout
    result: PreTrainedModel | PeftModel = loaded.model
    if adapter is None:
        result.requires_grad_(True)
    else:
        result = attach(loaded.model, peft_config(adapter, task, loaded.new_modules or loaded.head(new_head)))
    keep_trainable_in_float32(result, model)
    return result, loaded


def count(model: torch.nn.Module) -> Parameters:
    """Weights of a model; shared ones count once."""
    parameters = list(model.parameters())
    return Parameters(sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad))
