"""Which layers of an architecture are its output, known before any weight is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from peftune.model.heads import head_for
from peftune.model.reach import in_other_hands

POOLER = "pooler"
"""Part of a body that classification checkpoints may lack, and which then trains."""


def head_names(auto_class: Any, config: PreTrainedConfig, *, trust_remote_code: bool) -> list[str]:
    """Linear layers outside the body, what may be newly initialised inside it, and layers in other hands than their own
    (`in_other_hands`): never to be quantised."""
    with torch.device("meta"):
        model = head_for(auto_class, config).from_config(config, trust_remote_code=trust_remote_code)
    body = f"{model.base_model_prefix}."
    out, spared = model.get_output_embeddings(), {POOLER, *in_other_hands(config)}
    return sorted(name for name, module in model.named_modules() if isinstance(module, nn.Linear) and (
        module is out or not spared.isdisjoint(name.split(".")) or not name.startswith(body)))
