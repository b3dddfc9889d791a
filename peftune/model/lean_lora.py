"""LoRA layers that keep less for backward and touch memory less often, in place of peft's own. What they compute, save
and load is the same.

Shape letters: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional as F

Factors = tuple[Tensor, Tensor | None, Tensor, Tensor, float]


class LeanLoraLinear(Linear):
    """peft's own layer, whose steps with gradients compute y = x W^T + b + s (x A^T) B^T as one function.

    Only a plain layer's do: one active adapter, no dropout, no variant such as DoRA, floating-point weights. Passes
    without gradients are peft's own too, so that scores are those of the saved folder bit for bit.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., I] -> [..., O], in the type of x or of the autocast around it."""
        factors = None if args or kwargs else self.factors(x)
        if factors is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        with torch.autocast(x.device.type, enabled=False):
            product: Tensor = _LoraProduct.apply(x.to(factors[2].dtype), *factors)
            return product

    def factors(self, x: Tensor) -> Factors | None:
        """W [O, I], b [O], A [R, I], B [O, R] in the type of the product, and s, if this pass computes it as one."""
        base, kind = self.base_layer, x.device.type
        mixed = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if mixed else x.dtype
        name = self._lean_adapter(dtype, mixed) if torch.is_grad_enabled() else None
        if name is None:
            return None
        a_RI, b_OR = (part[name].weight.to(dtype) for part in (self.lora_A, self.lora_B))
        return base.weight, base.bias, a_RI, b_OR, self.scaling[name]

    def _lean_adapter(self, dtype: torch.dtype, mixed: bool) -> str | None:
        """The one active adapter, if the layer is plain, and its product is computed in `dtype`."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1 or self.fan_in_fan_out:
            return None
        name: str = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or type(self.base_layer) is not nn.Linear:
            return None
        if self.lora_B[name].bias is not None or not isinstance(self.lora_dropout[name], nn.Identity):
            return None
        if any(part.requires_grad or part.dtype != dtype for part in self.base_layer.parameters()):
            return None
        return name if mixed or self.lora_A[name].weight.dtype == dtype else None


class _LoraProduct(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T over frozen W and b. Keeps x and x A^T; a sum lands where its first part lies."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        x_TI = x.flatten(0, -2)
        y_TO, inner_TR = product(x_TI, w_OI, bias_O, a_RI, b_OR, scale)
        ctx.save_for_backward(x, w_OI, a_RI, b_OR, inner_TR)
        ctx.scale = scale
        return in_rows_of(x, y_TO)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, w_OI, a_RI, b_OR, inner_TR = ctx.saved_tensors
        below, of_a, of_b = slopes(gradients[0], x.flatten(0, -2), w_OI, a_RI, b_OR, inner_TR, ctx.scale,
                                    below=ctx.needs_input_grad[0])
        return None if below is None else below.view(x.shape), None, None, of_a, of_b, None


def in_rows_of(x: Tensor, y_TO: Tensor) -> Tensor:
    """[T, O] -> [..., O] as x [..., I] lies. No view: who calls a layer may change what it gives in place, which torch
    refuses for views that a function of ours has made."""
    rows: Tensor = torch.ops.aten._unsafe_view(y_TO, [*x.shape[:-1], y_TO.shape[-1]])
    return rows


def product(
    x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """x W^T + b + s (x A^T) B^T [T, O], and s x A^T [T, R]."""
    inner_TR = F.linear(x_TI, a_RI) * scale
    return F.linear(x_TI, w_OI, bias_O).addmm_(inner_TR, b_OR.t()), inner_TR


def slopes(
    slope: Tensor, x_TI: Tensor, w_OI: Tensor, a_RI: Tensor, b_OR: Tensor, inner_TR: Tensor, scale: float, *,
    below: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x [T, I], if it is asked for, of A and of B."""
    slope_TO = slope.flatten(0, -2)
    inner_slope_TR = (slope_TO @ b_OR) * scale
    below_TI = (slope_TO @ w_OI).addmm_(inner_slope_TR, a_RI) if below else None
    return below_TI, inner_slope_TR.t() @ x_TI, slope_TO.t() @ inner_TR
