"""Linear layers over 8-bit weights that compute with their dequantised values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
from torch import Tensor
from torch.nn import functional

LARGEST = 127.0


class Int8Linear(bitsandbytes.nn.Linear8bitLt):
    """y = x W^T + b with W = diag(s / 127) Q, Q int8 [out, in] and s the largest absolute value of each row.

    The scales are whole on every rank, so the rows may be divided among ranks. bitsandbytes' own product rounds x to
    float16 and 8 bits (on CPUs in evaluation alone), keeps x for backward although the weight has no gradient, and
    says for each layer what it casts.
    """

    @staticmethod
    def take_over(layer: bitsandbytes.nn.Linear8bitLt) -> None:
        """Make a loaded, quantised layer one of these, in place: a copy would need its weights twice."""
        layer.__class__ = Int8Linear
        if layer.state.SCB is None:
            layer.init_8bit_state()
        layer.state.CB = None  # a second name of the weight, which would keep it whole where ranks divide it

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the type of x or of the autocast around it."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        product: Tensor = _Product.apply(x, self.weight, self.state.SCB)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """The scales move with the weights."""
        super()._apply(fn, recurse)
        assert self.state.SCB is not None, "the layer was taken over before it was quantised"
        self.state.SCB = self.state.SCB.to(self.weight.device)
        return self


class _Product(torch.autograd.Function):
    """x W^T. Keeps W as it is stored, and no x: W has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(rows, scale)
        return functional.linear(x, _values(rows, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        rows, scale = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ _values(rows, scale, gradient.dtype), None, None


def _values(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """In float32, in the order of bitsandbytes' own dequantisation, so that they are its values bit for bit."""
    return (rows.detach() * scale.view(-1, 1) * (1.0 / LARGEST)).to(dtype)
