"""What a model's forward pass gives, the same for every kind of output layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def logits_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Logits of a forward pass; those of an answer's first and last token side by side, [B, T, 2]."""
    output = model(**inputs)
    if "start_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]], dim=-1)
    return output["logits"]
