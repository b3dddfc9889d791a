"""What a model's forward pass gives, the same for every kind of output layer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from peftune.model.adapters import base_of

LOOKED_AT = 64
"""Places of a sequence whose logits a check looks at."""


def logits_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Logits of a forward pass; those of an answer's first and last token side by side, [B, T, 2]."""
    output = model(**inputs)
    if "start_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]], dim=-1)
    return output["logits"]


def takes_places(model: nn.Module) -> bool:
    """Whether it can be asked for the logits of some places alone (`logits_to_keep`). A check that takes all of them
    needs more memory than a step: a vocabulary is much wider than a layer."""
    base = base_of(model)
    ours = type(base).__module__.startswith("transformers.")  # a model's own code may take a number there, no places
    return ours and "logits_to_keep" in inspect.signature(base.forward).parameters


def places(length: int) -> list[int]:
    """`LOOKED_AT` of them at most, from a sequence's first token to its last."""
    return sorted({at * (length - 1) // (LOOKED_AT - 1) for at in range(LOOKED_AT)})
