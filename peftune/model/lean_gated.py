"""Gated blocks that keep less for backward, in place of transformers' own. What they compute is the same."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from peftune.model.lean_lora import LeanLoraLinear, in_rows_of, product, slopes
from peftune.numerics.passes import PLAIN, Activation, Passes

GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
"""Parts of a gated feed-forward block, as transformers names them."""


class LeanGatedMLP(nn.Module):
    """down(f(gate(x)) * up(x)) (Shazeer, 2020, arXiv:2002.05202), with the input of `down` computed again in backward.

    As wide as the block is inside, that input and f(gate(x)) would be kept beside gate(x) and up(x). Where `down` is no
    lean LoRA layer, it is transformers' own block.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: Activation
    passes: Passes = PLAIN

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        factors = self.down_proj.factors(gate) if isinstance(self.down_proj, LeanLoraLinear) else None
        if factors is None or factors[2].dtype != gate.dtype:
            result: Tensor = self.down_proj(self.act_fn(gate) * up)
            return result
        with torch.autocast(x.device.type, enabled=False):
            product: Tensor = _GatedProduct.apply(gate, up, self.act_fn, self.passes, *factors)
            return product


class _GatedProduct(torch.autograd.Function):
    """The product of a LoRA layer with f(gate) * up, which is not kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, f: Activation, passes: Passes, *factors: Any) -> Tensor:
        w_OI, _, a_RI, b_OR, ctx.scale = factors
        y_TO, inner_TR = product(passes.gated(gate, up, f).flatten(0, -2), *factors)
        ctx.save_for_backward(gate, up, w_OI, a_RI, b_OR, inner_TR)
        ctx.f, ctx.passes = f, passes
        return in_rows_of(gate, y_TO)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, w_OI, a_RI, b_OR, inner_TR = ctx.saved_tensors
        inside, back = ctx.passes.gated_again(gate, up, ctx.f)
        below_TI, of_a, of_b = slopes(gradients[0], inside.flatten(0, -2), w_OI, a_RI, b_OR, inner_TR, ctx.scale,
                                      below=True)
        assert below_TI is not None, "asked for"
        of_gate, of_up = back(below_TI.view(up.shape))
        return of_gate, of_up, None, None, None, None, of_a, of_b, None


def is_plain_gated_block(module: nn.Module) -> bool:
    """Whether `LeanGatedMLP` gives the numbers of this module."""
    kind: Any = type(module)
    return set(module._modules) == GATED and not module._parameters and _multiplies_as_ours(kind)


@cache
@torch.no_grad()
def _multiplies_as_ours(kind: Any) -> bool:
    """Whether a class of gated blocks computes nothing else, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    blocks: tuple[Any, Any] = kind.__new__(kind), LeanGatedMLP.__new__(LeanGatedMLP)
    for block in blocks:
        nn.Module.__init__(block)
    for name, inputs, outputs in (("gate_proj", 8, 24), ("up_proj", 8, 24), ("down_proj", 24, 8)):
        part = nn.Linear(inputs, outputs, device="cpu")
        for parameter in part.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu"))
        for block in blocks:
            setattr(block, name, part)
    for block in blocks:
        block.act_fn = nn.SiLU()
    x_TD = torch.randn(5, 8, generator=generator, device="cpu")
    try:
        expected, found = (block(x_TD) for block in blocks)
    except (TypeError, RuntimeError, AttributeError):
        return False
    return torch.equal(found, expected)
