"""Rotary positions whose gradient is the rotation back, in place of those of transformers' attention layers.

As transformers writes them, halves of heads are cut out and put together, and backward fills a whole tensor with zeros
for each half. What they compute is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from peftune.numerics.passes import PLAIN, Passes

ROTATE = "apply_rotary_pos_emb"
"""What transformers' attention layers call."""
PARAMETERS = ["q", "k", "cos", "sin", "unsqueeze_dim"]


Rotate = Callable[..., tuple[Tensor, Tensor]]


class LeanRotation:
    """What attention layers are whose rotation is ours; their own class is the second base."""


@cache
def with_lean_rotation(kind: Any, passes: Passes) -> type[nn.Module] | None:
    """A class of attention layers that rotates as ours, if this one's rotation gives the same.

    Its forward pass is that of `kind`, in which the name of the rotation means ours.
    """
    if issubclass(kind, LeanRotation):
        kind = kind.__bases__[1]
    forward: Any = kind.forward
    if not isinstance(forward, FunctionType) or ROTATE not in forward.__code__.co_names:
        return None
    theirs = forward.__globals__.get(ROTATE)
    if not isinstance(theirs, FunctionType) or not _rotates_as_ours(theirs):
        return None
    names = {**forward.__globals__, ROTATE: _rotation(theirs, passes)}
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return type(kind.__name__, (LeanRotation, kind), {"forward": ours})


def _rotation(theirs: Rotate, passes: Passes) -> Rotate:
    """The function that layers call. Theirs again where only a part of each head turns, or nothing learns."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        alike = all(x.dtype == q.dtype and x.shape[-1] == q.shape[-1] for x in (k, cos, sin))
        if not torch.is_grad_enabled() or not alike or cos.requires_grad:
            return theirs(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return _Rotation.apply(q, cos, sin, passes), _Rotation.apply(k, cos, sin, passes)

    return rotate


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, passes: Passes) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.passes = passes
        return passes.rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        below: Tensor = ctx.passes.rotated_slope(gradients[0], cos, sin)
        return below, None, None, None


@cache
def _rotates_as_ours(theirs: Rotate) -> bool:
    """Whether a rotation gives our numbers bit for bit."""
    taken = signature(theirs).parameters
    if list(taken) != PARAMETERS or taken["unsqueeze_dim"].default != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 5, 8), (2, 2, 5, 8), (2, 5, 8), (2, 5, 8)
    wide = [torch.randn(shape, generator=generator, device="cpu") for shape in shapes]
    for dtype in (torch.float32, torch.bfloat16):
        given = [x.to(dtype) for x in wide]
        try:
            with torch.no_grad():
                expected = theirs(*given)
            found = [PLAIN.rotated(x, given[2].unsqueeze(1), given[3].unsqueeze(1)) for x in given[:2]]
        except (TypeError, RuntimeError, AttributeError):
            return False
        if not all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)):
            return False
    return True
