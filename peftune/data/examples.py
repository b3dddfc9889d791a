"""Tokenised examples, and the micro-batches that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from peftune.numerics.losses import Predicted

TargetKind = Literal["token", "pair", "class", "values"]
"""token: one id a position [T]; pair: the same for two sequences an example; class: one id an example [1];
values: floats an example [K]."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row or window of it, tokenised and cut to the length limit."""

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
    first_part: int = 0
    """Pairs: tokens of the first sequence; the second one follows it in `input_ids` and `targets`."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of one micro-batch on the model's device. B rows, T tokens, K values.

    A padded row holds one sequence, the single row of a packed batch all of them. An example is one sequence, or two
    for pairs.
    """

    inputs: dict[str, Any]
    """Keyword arguments of the model's forward: input_ids [B, T] int64, attention_mask, position_ids, ..."""
    targets: Tensor
    """[B, T] int64 for token and pair targets, [examples] int64 for classes, [examples, K] float32 for values."""
    owners: Tensor
    """[B, T] int64: the sequence of each token of a token or pair batch."""
    predicted: Callable[[], Predicted]
    """The supervised tokens of a token or pair batch whose targets are next tokens."""
    lengths: tuple[int, ...]
    """Tokens of each sequence; one of a single token in an empty micro-batch."""
    positions: tuple[int, ...]
    """Position of each example in its split; empty for a micro-batch that only keeps step with other ranks."""
    tokens: int
    """Tokens that are not padding."""
