"""What lies between products, fused by torch.compile: tried on the device before a run relies on it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch.nn import functional as F

from peftune.errors import Fault, MachineError, in_a_line
from peftune.numerics.passes import PLAIN, Passes, fused

TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
"""Of a result's distance from the plain one, over its size: rounding of each type."""


def fused_passes(device: torch.device, dtype: torch.dtype) -> Passes:
    """The fused functions, compiled for a type.

    Raises:
        MachineError: they cannot be compiled here, or compute something else.
    """
    inductor.compile_threads = 1  # so few functions need no pool of processes, which would stay
    try:
        deviation = _deviation(fused(), device, dtype)
    except RuntimeError as error:
        raise MachineError(Fault(
            kind="environment", message=f"model.compile = 'parts': torch.compile fails here: {in_a_line(error)}",
            mend=f"model.compile=false, or install {'g++' if device.type == 'cpu' else 'triton'}")) from error
    if not deviation <= TOLERANCE[dtype]:
        raise MachineError(Fault(
            kind="environment", message=f"model.compile = 'parts': what torch.compile makes here differs by "
            f"{deviation:.2g}", mend="model.compile=false"))
    return fused()


@torch.no_grad()
def _deviation(passes: Passes, device: torch.device, dtype: torch.dtype) -> float:
    """The largest one of a function."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    x, slope, gate, up = (drawn(1, 40, 48) for _ in range(4))
    weight, q, cos, sin = drawn(48), drawn(1, 40, 4, 16).transpose(1, 2), drawn(1, 1, 40, 16), drawn(1, 1, 40, 16)
    results: list[list[Tensor]] = []
    for one in (passes, PLAIN):
        normed, root = one.normed(x, weight, 1e-5)
        inside, back = one.gated_again(gate, up, F.silu)
        results.append([normed, one.norm_slope(slope, x, weight, root), one.gated(gate, up, F.silu), inside,
                        *back(slope), one.rotated(q, cos, sin), one.rotated_slope(q, cos, sin)])
    return max(((found.float() - plain.float()).norm() / plain.float().norm()).item()
               for found, plain in zip(*results, strict=True))
