"""Attention of short sequences in bfloat16 on CPUs, whose gradients are computed in float32: faster there, and nearer.

torch 2.13's kernel for backward spends a fixed time on each sequence and head; in bfloat16 so much of it that the
float32 kernel is the faster one up to some 200 tokens. `peftune bench step` measures the gain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SHORT = 192
"""Tokens of the longest sequences whose gradients are computed in float32; beyond, bfloat16's kernel catches up."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query, key and value [N, H, L, D] -> [N, L, H, D], without dropout."""


def attend_short(attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The output of `attend`; its gradients by way of float32 where that pays."""
    pays = (torch.is_grad_enabled() and query.device.type == "cpu" and query.shape[2] <= SHORT
            and all(x.dtype == torch.bfloat16 for x in (query, key, value)))
    if not pays:
        return attend(query, key, value)
    output: Tensor = _WideGradients.apply(attend, query, key, value)
    return output


class _WideGradients(torch.autograd.Function):
    """Keeps query, key and value alone: backward attends again, in float32."""

    @staticmethod
    def forward(ctx: Any, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.attend = attend
        ctx.save_for_backward(query, key, value)
        return attend(query, key, value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, *tuple[Tensor, ...]]:
        (gradient,) = gradients
        wide = [x.float().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad(), torch.autocast(gradient.device.type, enabled=False):
            output = ctx.attend(*wide)
        found = torch.autograd.grad(output, wide, gradient.float())
        return None, *(x.to(gradient.dtype) for x in found)
