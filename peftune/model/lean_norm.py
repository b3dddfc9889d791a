"""RMS norms that keep less for backward, in place of transformers' own. What they compute and save is the same."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from peftune.numerics.passes import PLAIN, Passes, normed


class LeanRMSNorm(nn.Module):
    """w n, n = x / sqrt(mean(x^2) + e) (Zhang and Sennrich, 2019, arXiv:1910.07467), with n computed again in backward.

    Its outputs are the taken-over norm's bit for bit. That one keeps x and n in float32.
    """

    weight: nn.Parameter
    variance_epsilon: float
    passes: Passes = PLAIN

    def forward(self, hidden_states: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        if not torch.is_grad_enabled():
            return normed(hidden_states, self.weight, self.variance_epsilon)[0]
        result: Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, self.passes)
        return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, passes: Passes) -> Tensor:
        y, root = passes.normed(x, weight, epsilon)
        ctx.save_for_backward(x, weight, root)
        ctx.passes = passes
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, root = ctx.saved_tensors
        (slope,) = gradients
        below = of_weight = None
        if ctx.needs_input_grad[1]:
            products = slope * (x.to(torch.float32) * root).to(x.dtype)
            of_weight = products.flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            below = ctx.passes.norm_slope(slope, x, weight, root)
        return below, of_weight, None, None


def is_plain_rms_norm(module: nn.Module) -> bool:
    """Whether `LeanRMSNorm` gives the numbers of this module."""
    kind: Any = type(module)
    return (kind.__name__.endswith("RMSNorm") and set(module._parameters) == {"weight"}
            and not module._buffers and not module._modules
            and isinstance(vars(module).get("variance_epsilon"), float) and _computes_as_ours(kind))


@cache
@torch.no_grad()
def _computes_as_ours(kind: Any) -> bool:
    """Whether a class of norms gives our numbers bit for bit, tried in each mixture of types that runs have."""
    generator = torch.Generator().manual_seed(0)
    x_TD, weight_D = (torch.randn(shape, generator=generator, device="cpu") for shape in ((3, 48), (48,)))
    for x_type, weight_type in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                                (torch.bfloat16, torch.float32)):
        norms: tuple[Any, Any] = kind.__new__(kind), LeanRMSNorm.__new__(LeanRMSNorm)
        for norm in norms:
            nn.Module.__init__(norm)
            norm.weight, norm.variance_epsilon = nn.Parameter(weight_D.to(weight_type)), 1e-3
        try:
            expected, found = (norm(x_TD.to(x_type)) for norm in norms)
        except (TypeError, RuntimeError, AttributeError):
            return False
        if found.dtype != expected.dtype or not torch.equal(found, expected):
            return False
    return True
