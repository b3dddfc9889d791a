"""Take over the layers whose training steps can be made lean, in place of peft's and transformers' own."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear
from torch import nn

from peftune.model.lean_gated import LeanGatedMLP, is_plain_gated_block
from peftune.model.lean_lora import LeanLoraLinear
from peftune.model.lean_norm import LeanRMSNorm, is_plain_rms_norm
from peftune.model.lean_rotary import LeanRotation, with_lean_rotation
from peftune.numerics.passes import PLAIN, Passes


def make_lean(model: nn.Module, *, by_module: bool, passes: Passes = PLAIN) -> None:
    """Take over the layers that are known to be equal; leave all others as they are.

    Args:
        model: with its adapter; changed in place.
        by_module: weights are gathered for the call of their own module, which a LoRA layer in one piece does not make.
        passes: how elementwise functions run.
    """
    module: Any
    for module in model.modules():
        kind: Any = type(module)
        rotating = with_lean_rotation(kind, passes)
        if rotating is not None:
            module.__class__ = rotating
        elif is_plain_rms_norm(module):
            module.__class__, module.passes = LeanRMSNorm, passes
        elif is_plain_gated_block(module) and not by_module:
            module.__class__, module.passes = LeanGatedMLP, passes
        elif kind is Linear and not by_module:
            module.__class__ = LeanLoraLinear


def layers_of_passes(model: nn.Module) -> int:
    """How many layers compute elementwise functions that can be fused."""
    return sum(isinstance(module, LeanRMSNorm | LeanGatedMLP | LeanRotation) for module in model.modules())
