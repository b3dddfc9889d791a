"""Rows on which two models must agree, and how far they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftune.model.outputs import logits_of

ROUND_OFF = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of a value that is rounded to the type once."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Inputs of models, one row each and so without padding, on the CPU."""

    inputs: Sequence[dict[str, Any]]
    origin: str
    """Where they come from, for a person."""
    held_out: bool
    """Whether they are data that no step has trained on."""

    @torch.no_grad()
    def logits(self, model: nn.Module, autocast: Callable[[], AbstractContextManager[None]] = nullcontext
               ) -> list[Tensor]:
        """Logits of each row, without dropout, float32, on the CPU."""
        model.eval()
        device = next(model.parameters()).device
        with autocast():
            return [logits_of(model, {key: value.to(device) for key, value in row.items()}).float().cpu()
                    for row in self.inputs]


def made_rows(vocabulary: int, *, rows: int = 8, tokens: int = 24) -> Rows:
    """Random tokens, the same each time, where there is no data."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows, 1, tokens), generator=draw)
    return Rows([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], "random tokens", False)


def deviation(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Largest absolute difference of two models' logits for the same rows; infinite where one has no number."""
    largest = max(((a - b).abs().max().item() for a, b in zip(first, second, strict=True)), default=0.0)
    return largest if largest == largest else float("inf")


def largest_logit(logits: Sequence[Tensor]) -> float:
    """Largest absolute logit, the scale on which rounding counts."""
    return max((row.abs().max().item() for row in logits), default=0.0)


def rounding_tolerance(dtype: torch.dtype, logits: Sequence[Tensor], exact: float, layers: int) -> float:
    """How far logits may move because the weights are kept in `dtype`: exact + u (2 + sqrt(layers)) of the largest one.

    Rounding moves each weight by up to u of itself (2^-8 in bfloat16, 2^-11 in float16), and the errors of the layers
    add like a random walk. Merged Llamas of random weights move by up to 2.1 u of the largest logit with 2 layers,
    3.1 u with 8 and 4.0 u with 32, in both types; so this leaves some room. It says nothing of the merge itself, which
    is checked in float32, at `exact`.
    """
    return exact + (2 + math.sqrt(layers)) * ROUND_OFF[dtype] * largest_logit(logits)
