"""Whether a model that is prepared for packed sequences keeps them apart: asked of its layers, and proven by values."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from peftune.model.outputs import logits_of, places, takes_places
from peftune.model.packing import SEGMENTS, register, segment_attention
from peftune.model.proof import UNPROVEN, random_sequences, why_unproven

Inputs = dict[str, Any]
RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference between packed and separate logits, as a share of the largest logit: room for kernels that sum
in another order. A wrong position or mask is far beyond it."""


@torch.no_grad()
def hears_lengths(model: nn.Module, inputs: Inputs) -> bool:
    """Whether each attention layer is told where sequences end: layers of some models pass nothing on (StableLM,
    Nemotron).

    Args:
        model: prepared by `use_packing`, of segments.
        inputs: a packed batch.
    """
    told: list[bool] = []

    def listening(module: nn.Module, *tensors: Any, **kwargs: Any) -> tuple[Tensor, None]:
        told.append(kwargs.get("segment_lengths") is not None)
        return segment_attention(module, *tensors, **kwargs)

    AttentionInterface.register(SEGMENTS, listening)
    try:
        model(**inputs)
    finally:
        register()
    return bool(told) and all(told)


@torch.no_grad()
def packing_fault(
    model: nn.Module, lay_out: Callable[[Sequence[Sequence[int]], bool], Inputs], *, lengths: Sequence[int],
    vocabulary: int, padding: int, dtype: torch.dtype, autocast: Callable[[], AbstractContextManager[None]],
    pooled: bool,
) -> str | None:
    """Prove on random tokens that packed sequences are computed as if each were alone; else say what differs.

    Two proofs: another first sequence leaves the logits of the others as they were, bit for bit; and the packed
    logits are those of padded rows, up to rounding.

    Args:
        model: prepared by `use_packing`, with its adapter.
        lay_out: sequences of ids, and whether to pack them -> inputs of the model.
        lengths: of the sequences to try, at least two.
        vocabulary: ids are drawn below it.
        padding: the one id that is not drawn, since some models look for it.
        dtype: of the matrix products, which decides what rounding may do.
        autocast: precision of the forward pass.
        pooled: logits are one row a sequence, not one a token.
    """
    first, other, *rest = random_sequences((lengths[0], *lengths), vocabulary=vocabulary, padding=padding)
    was_training = model.training
    model.eval()
    try:
        with autocast():
            packed = _some_logits(model, lay_out([first, *rest], True), lengths, pooled)
            changed = _some_logits(model, lay_out([other, *rest], True), lengths, pooled)
            separate = _some_logits(model, lay_out([first, *rest], False), lengths, pooled, padded=True)
    except UNPROVEN as error:
        return why_unproven(error)
    finally:
        model.train(was_training)
    if not all(torch.equal(a, b) for a, b in zip(packed[1:], changed[1:], strict=True)):
        return "packed examples read each other"
    deviation = max((a - b).abs().max().item() for a, b in zip(packed, separate, strict=True))
    largest = max(b.abs().max().item() for b in separate)
    if not deviation <= RELATIVE_TOLERANCE[dtype] * largest:
        return f"packed logits differ from separate ones by {deviation:.3g} (largest logit {largest:.3g})"
    return None


def _some_logits(
    model: nn.Module, inputs: Inputs, lengths: Sequence[int], pooled: bool, *, padded: bool = False
) -> list[Tensor]:
    """By sequence: its logits, at a few places where the model can be asked for those alone."""
    if pooled:
        return list(logits_of(model, inputs))
    few = takes_places(model)
    begins = [0] * len(lengths) if padded else [0, *accumulate(lengths[:-1])]
    looked_at = [[begin + at for at in (places(length) if few else range(length))]
                 for begin, length in zip(begins, lengths, strict=True)]
    asked, device = sorted({*chain(*looked_at)}), inputs["input_ids"].device
    logits = logits_of(model, inputs | ({"logits_to_keep": torch.tensor(asked, device=device)} if few else {}))
    rows = logits if padded else logits.expand(len(lengths), -1, -1)
    return [row[[bisect_left(asked, place) for place in own]] for row, own in zip(rows, looked_at, strict=True)]
