"""Tokenised examples, and how those of a micro-batch lie in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from peftune.numerics.losses import IGNORE

TargetKind = Literal["token", "class", "values"]
"""token: one id a position [T]; class: one id an example [1]; values: floats an example [K]."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row, tokenised and cut to the length limit."""

    input_ids: Sequence[int]
    targets: Sequence[float]
    """Ids (IGNORE outside the loss) or values, by the task's TargetKind."""
    num_targets: int
    """What the example adds to the count that the step's loss is divided by."""
    full_length: int
    """Tokens before it was cut."""
    record: Mapping[str, Any]
    """What the predictions file needs of the row: id, reference, ..."""
    segment_ids: Sequence[int] | None = None
    """token_type_ids, for models that tell two texts apart by them."""
    source: int = 0
    """Position of the row's source in `data.train`."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of one micro-batch on the model's device. B examples, T tokens, K values."""

    inputs: dict[str, Tensor]
    """Keyword arguments of the model's forward: input_ids and attention_mask [B, T] int64, perhaps token_type_ids."""
    targets: Tensor
    """[B, T] int64 for token targets, [B] int64 for classes, [B, K] float32 for values."""
    positions: tuple[int, ...]
    """Position of each example in its split; empty for a micro-batch that only keeps step with other ranks."""
    tokens: int
    """Tokens that are not padding."""


def padded(
    examples: Sequence[Example], positions: Sequence[int], *, pad_id: int, kind: TargetKind, width: int,
    device: torch.device, left: bool = False,
) -> Batch:
    """Lay examples out as rows of equal length.

    No example at all gives one row of one token and no target: its loss and gradients are zero, but every
    trainable weight takes part, so that a rank with less work stays in step with the others.

    Args:
        examples: what to lay out.
        positions: their positions in the split.
        pad_id: id that fills rows up.
        kind: what the targets are.
        width: K, values an example has; read for an empty batch of values only.
        device: where the tensors go.
        left: pad on the left, for generation.
    """
    rows, longest = max(1, len(examples)), max([1, *(len(example.input_ids) for example in examples)])
    ids = np.full((rows, longest), pad_id, dtype=np.int64)
    mask = np.zeros((rows, longest), dtype=np.int64)
    segments = np.zeros((rows, longest), dtype=np.int64)
    for row, example in enumerate(examples):
        span = slice(longest - len(example.input_ids), longest) if left else slice(0, len(example.input_ids))
        ids[row, span] = example.input_ids
        mask[row, span] = 1
        if example.segment_ids is not None:
            segments[row, span] = example.segment_ids
    tokens = int(mask.sum())
    if not examples:
        mask[:] = 1  # attention over nothing at all would be NaN
    inputs = {"input_ids": ids, "attention_mask": mask}
    if any(example.segment_ids is not None for example in examples):
        inputs["token_type_ids"] = segments
    return Batch(
        inputs={name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in inputs.items()},
        targets=torch.from_numpy(_targets(examples, kind, width, longest)).to(device, non_blocking=True),
        positions=tuple(positions),
        tokens=tokens,
    )


def _targets(examples: Sequence[Example], kind: TargetKind, width: int, longest: int) -> np.ndarray:
    if kind == "values":
        if not examples:
            return np.full((1, width), np.nan, dtype=np.float32)
        return np.asarray([example.targets for example in examples], dtype=np.float32)
    if kind == "class":
        return np.asarray([example.targets[0] for example in examples] or [IGNORE], dtype=np.int64)
    targets = np.full((max(1, len(examples)), longest), IGNORE, dtype=np.int64)
    for row, example in enumerate(examples):
        targets[row, : len(example.targets)] = example.targets
    return targets
