"""What a transformer computes element by element between its products of matrices, forward and backward.

Each of these functions is several passes over memory as torch runs it, and one or two where torch.compile fuses it.
Both give the same up to rounding. Shape letters: T tokens, D hidden size, F inner size of a gated block, H heads, E
size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
Back = Callable[[Tensor], tuple[Tensor, Tensor]]


def normed(x: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """w n, n = x / sqrt(mean(x^2) + e) (Zhang and Sennrich, 2019, arXiv:1910.07467), and the root's inverse.

    Args:
        x: [..., D], any float dtype; n is rounded to it.
        weight_D: any float dtype.
        epsilon: e.

    Returns:
        [..., D] in the type that x and the weight promote to, and [..., 1] float32.
    """
    wide = x.to(torch.float32)
    root = (wide * wide).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    return weight_D * (wide * root).to(x.dtype), root


def norm_slope(slope: Tensor, x: Tensor, weight_D: Tensor, root: Tensor) -> Tensor:
    """Gradient of x in `normed`, [..., D] in the type of x: r (w g - n mean(w g n))."""
    unit = x.to(torch.float32) * root
    wide = (slope * weight_D).to(x.dtype).to(torch.float32)
    shared = (wide * unit).mean(-1, keepdim=True)
    return torch.sub(wide, unit.mul_(shared)).mul_(root).to(x.dtype)


def gated(gate: Tensor, up: Tensor, f: Activation) -> Tensor:
    """f(gate) up, [..., F] (Shazeer, 2020, arXiv:2002.05202)."""
    return f(gate) * up


def gated_again(gate: Tensor, up: Tensor, f: Activation) -> tuple[Tensor, Back]:
    """`gated`, computed in backward; and the function that takes its gradient to those of gate and up, [..., F]."""
    with torch.enable_grad():
        gate = gate.detach().requires_grad_()
        opened = f(gate)
    open_now = opened.detach()

    def back(slope: Tensor) -> tuple[Tensor, Tensor]:
        (of_gate,) = torch.autograd.grad(opened, gate, slope * up)
        return of_gate, slope * open_now

    return open_now * up, back


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (-x2, x1) sin, where x1 and x2 are the halves of a head (Su et al., 2021, arXiv:2104.09864).

    Args:
        x: [..., H, T, E].
        cos, sin: [..., 1, T, E], of the angle of each position and element.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotated_slope(slope: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of x in `rotated`: the rotation back."""
    first, second = (slope * sin).chunk(2, dim=-1)
    return slope * cos + torch.cat((second, -first), dim=-1)


@dataclass(frozen=True, slots=True)
class Passes:
    """One choice of how the functions above run."""

    normed: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = normed
    norm_slope: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = norm_slope
    gated: Callable[[Tensor, Tensor, Activation], Tensor] = gated
    gated_again: Callable[[Tensor, Tensor, Activation], tuple[Tensor, Back]] = gated_again
    rotated: Callable[[Tensor, Tensor, Tensor], Tensor] = rotated
    rotated_slope: Callable[[Tensor, Tensor, Tensor], Tensor] = rotated_slope


PLAIN = Passes()


@cache
def fused() -> Passes:
    """Each function as torch.compile makes it, once for all numbers of tokens. It compiles at the first call."""
    compiled = partial(torch.compile, dynamic=True)
    product, slopes = compiled(gated), compiled(_gated_slopes)

    def again(gate: Tensor, up: Tensor, f: Activation) -> tuple[Tensor, Back]:
        return product(gate, up, f), lambda slope: slopes(slope, gate, up, f)

    return Passes(compiled(normed), compiled(norm_slope), product, again, compiled(rotated), compiled(rotated_slope))


def _gated_slopes(slope: Tensor, gate: Tensor, up: Tensor, f: Activation) -> tuple[Tensor, Tensor]:
    opened, back, *_ = torch.func.vjp(f, gate)
    (of_gate,) = back(slope * up)
    return of_gate, slope * opened
