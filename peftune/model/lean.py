"""LoRA layers, RMS norms and gated blocks that keep less for backward and touch memory less often, in place of peft's
and transformers' own. What they compute, save and load is the same.

Shape letters: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional as F


def make_lean(model: nn.Module, *, by_module: bool) -> None:
    """Take over the layers that are known to be equal; leave all others as they are.

    Args:
        model: with its adapter; changed in place.
        by_module: weights are gathered for the call of their own module, which a LoRA layer in one piece does not make.
    """
    for module in model.modules():
        if _is_plain_rms_norm(module):
            module.__class__ = LeanRMSNorm
        elif _is_plain_gated_block(module) and not by_module:
            module.__class__ = LeanGatedMLP
        elif type(module) is Linear and not by_module:
            module.__class__ = LeanLoraLinear


Factors = tuple[Tensor, Tensor | None, Tensor, Tensor, float]
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
"""Parts of a gated feed-forward block, as transformers names them."""


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
        y_TO, inner_TR = _product(x_TI, w_OI, bias_O, a_RI, b_OR, scale)
        ctx.save_for_backward(x, w_OI, a_RI, b_OR, inner_TR)
        ctx.scale = scale
        return y_TO.view(*x.shape[:-1], len(w_OI))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, w_OI, a_RI, b_OR, inner_TR = ctx.saved_tensors
        below, of_a, of_b = _slopes(gradients[0], x.flatten(0, -2), w_OI, a_RI, b_OR, inner_TR, ctx.scale,
                                    below=ctx.needs_input_grad[0])
        return None if below is None else below.view(x.shape), None, None, of_a, of_b, None


def _product(
    x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """x W^T + b + s (x A^T) B^T [T, O], and s x A^T [T, R]."""
    inner_TR = F.linear(x_TI, a_RI) * scale
    return F.linear(x_TI, w_OI, bias_O).addmm_(inner_TR, b_OR.t()), inner_TR


def _slopes(
    slope: Tensor, x_TI: Tensor, w_OI: Tensor, a_RI: Tensor, b_OR: Tensor, inner_TR: Tensor, scale: float, *,
    below: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x [T, I], if it is asked for, of A and of B."""
    slope_TO = slope.flatten(0, -2)
    inner_slope_TR = (slope_TO @ b_OR) * scale
    below_TI = (slope_TO @ w_OI).addmm_(inner_slope_TR, a_RI) if below else None
    return below_TI, inner_slope_TR.t() @ x_TI, slope_TO.t() @ inner_TR


class LeanGatedMLP(nn.Module):
    """down(f(gate(x)) * up(x)) (Shazeer, 2020, arXiv:2002.05202), with the input of `down` computed again in backward.

    As wide as the block is inside, that input and f(gate(x)) would be kept beside gate(x) and up(x). Where `down` is no
    lean LoRA layer, it is transformers' own block.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        factors = self.down_proj.factors(gate) if isinstance(self.down_proj, LeanLoraLinear) else None
        if factors is None or factors[2].dtype != gate.dtype:
            result: Tensor = self.down_proj(self.act_fn(gate) * up)
            return result
        with torch.autocast(x.device.type, enabled=False):
            product: Tensor = _GatedProduct.apply(gate, up, self.act_fn, *factors)
            return product


class _GatedProduct(torch.autograd.Function):
    """The product of a LoRA layer with f(gate) * up, which is not kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, f: Callable[[Tensor], Tensor], *factors: Any) -> Tensor:
        w_OI, _, a_RI, b_OR, ctx.scale = factors
        y_TO, inner_TR = _product((f(gate) * up).flatten(0, -2), *factors)
        ctx.save_for_backward(gate, up, w_OI, a_RI, b_OR, inner_TR)
        ctx.f = f
        return y_TO.view(*gate.shape[:-1], len(w_OI))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, w_OI, a_RI, b_OR, inner_TR = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            opened = ctx.f(gate)
        open_now = opened.detach()
        below_TI, of_a, of_b = _slopes(gradients[0], (open_now * up).flatten(0, -2), w_OI, a_RI, b_OR, inner_TR,
                                       ctx.scale, below=True)
        assert below_TI is not None, "asked for"
        below = below_TI.view(up.shape)
        (of_gate,) = torch.autograd.grad(opened, gate, below * up)
        return of_gate, below.mul_(open_now), None, None, None, of_a, of_b, None


class LeanRMSNorm(nn.Module):
    """w n, n = x / sqrt(mean(x^2) + e) (Zhang and Sennrich, 2019, arXiv:1910.07467), with n computed again in backward.

    Its outputs are the taken-over norm's bit for bit. That one keeps x and n in float32.
    """

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        if not torch.is_grad_enabled():
            return self.weight * _normed(hidden_states, self.variance_epsilon)[0].to(hidden_states.dtype)
        result: Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        return result


def _normed(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """n [..., D] and 1 / sqrt(mean(x^2) + e) [..., 1], both in float32."""
    wide = x.to(torch.float32)
    root = (wide * wide).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    return wide * root, root


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        normed, root = _normed(x, epsilon)
        ctx.save_for_backward(x, weight, root)
        return weight * normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, root = ctx.saved_tensors
        (slope,) = gradients
        normed = x.to(torch.float32) * root
        below = of_weight = None
        if ctx.needs_input_grad[1]:
            products = slope * normed.to(x.dtype)
            of_weight = products.flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            wide = (slope * weight).to(x.dtype).to(torch.float32)
            shared = (wide * normed).mean(-1, keepdim=True)
            below = torch.sub(wide, normed.mul_(shared)).mul_(root).to(x.dtype)
        return below, of_weight, None


def _is_plain_rms_norm(module: nn.Module) -> bool:
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


def _is_plain_gated_block(module: nn.Module) -> bool:
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
