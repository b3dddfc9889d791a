"""Losses as sums, one number an example: whoever holds the global target count divides, once.

They are float32, or float64 where the logits are.

Shape letters: B examples, T tokens, V vocabulary, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Target id of a position outside the loss; the value that torch's cross-entropy skips."""


def _wide(tensor: Tensor) -> Tensor:
    """At least float32; float64 stays, so that references can be exact."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def next_token_nats(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy of each example's next-token predictions, in nats, summed over its supervised tokens.

    Position t predicts token t + 1. Only supervised rows are widened to float32, so the float32 copy
    is [supervised tokens, V] and not [B, T, V].

    Args:
        logits_BTV: unshifted logits, any float dtype.
        targets_BT: unshifted target ids, int64; IGNORE marks tokens outside the loss.

    Returns:
        [B] float32.
    """
    next_BT = targets_BT[:, 1:]
    supervised_BT = next_BT != IGNORE
    nats = F.cross_entropy(_wide(logits_BTV[:, :-1][supervised_BT]), next_BT[supervised_BT], reduction="none")
    owner = supervised_BT.nonzero()[:, 0]
    return nats.new_zeros(targets_BT.shape[0]).index_add(0, owner, nats)


def class_nats(logits_BK: Tensor, targets_B: Tensor) -> Tensor:
    """Cross-entropy of single-label classification, in nats. Targets int64 [B] -> [B] float32; 0 where IGNORE."""
    return F.cross_entropy(_wide(logits_BK), targets_B, ignore_index=IGNORE, reduction="none")


def label_nats(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Binary cross-entropy of multi-label classification, in nats, summed over the K labels.

    Targets are 0.0 or 1.0, float [B, K]; NaN rows (empty micro-batches) count nothing. Returns [B] float32.
    """
    real = ~targets_BK.isnan()
    losses = F.binary_cross_entropy_with_logits(
        _wide(logits_BK), targets_BK.nan_to_num().to(_wide(logits_BK).dtype), reduction="none")
    return (losses * real).sum(-1)


def squared_error(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Squared error of regression, summed over the K outputs; NaN targets count nothing. Returns [B] float32."""
    real = ~targets_BK.isnan()
    return ((_wide(logits_BK) - targets_BK.nan_to_num()).square() * real).sum(-1)
