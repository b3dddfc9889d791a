"""How the examples of a micro-batch lie in memory: as rows of equal length, or end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from peftune.data.examples import Batch, Example, TargetKind
from peftune.numerics.dealing import Grouping, equal_groups, packed_groups, padded_groups
from peftune.numerics.few_shapes import filled_up
from peftune.numerics.losses import IGNORE, predicted_tokens
from peftune.numerics.transfer import ends_of, to_device


class Division(Protocol):
    """Neighbouring ranks that share each packed row, and this one among them."""

    @property
    def place(self) -> int:
        """Which part of a row this rank holds, from 0."""
        ...

    @property
    def ranks(self) -> int:
        """How many share a row, N."""
        ...

    def exchange(self, parts: Tensor) -> Tensor:
        """[N, ...], whose part i is for place i -> [N, ...], whose part i came from there; for `model/division.py`."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Over these ranks, on each of them."""
        ...


@dataclass(frozen=True, slots=True)
class Layout:
    """padded: a row a sequence. segments, varlen: packed, without any padding; the attention is told the borders,
    by length for SDPA over segments, by cumulative lengths for FlashAttention."""

    kind: Literal["padded", "segments", "varlen"] = "padded"
    first_position: int = 0
    """Position id of a sequence's first token."""
    division: Division | None = None
    """Who shares each row, where one device holds a part of it alone. For segments of token targets."""
    few_sizes: bool = False
    """Packed rows are filled up with tokens that no sequence and no loss sees, to one of few sizes (`filled_up`)."""
    at_once: bool = False
    """Segments' borders are told in device memory too, for a kernel that takes all sequences in one call."""
    equal_lengths: bool = False
    """Padded rows of a micro-batch are equally long, so that there is no padding: the model's results depend on it."""

    def hand(self, rank: int, ranks: int) -> tuple[int, int]:
        """Whose examples a rank takes, of how many: its own, or those of the ranks it shares rows with."""
        together = 1 if self.division is None else self.division.ranks
        return rank // together, ranks // together

    @property
    def name(self) -> str:
        """As in the config: padded or packed."""
        return "padded" if self.kind == "padded" else "packed"

    @property
    def grouping(self) -> Grouping:
        """How a step's examples are cut into micro-batches."""
        return equal_groups if self.equal_lengths else padded_groups if self.kind == "padded" else packed_groups


PADDED = Layout()


def lay_out(
    examples: Sequence[Example], positions: Sequence[int], *, layout: Layout = PADDED, pad_id: int, kind: TargetKind,
    width: int, device: torch.device, left: bool = False,
) -> Batch:
    """Make one micro-batch.

    No example at all gives sequences of one token without a target: loss and gradients are zero, but every
    trainable weight takes part, so that a rank with less work stays in step with the others.

    A packed batch of token or pair targets is one row. One of classes or values keeps its padded ids, from which the
    model's output layer finds the first or last token, and carries the lengths by which its body packs them
    (`model/packing.py`).

    A divided row is filled up with sequences that no loss looks at, until its ranks hold equally many tokens. The
    batch then holds this rank's part, with the targets and owners of one token more: the next part's first, which this
    part's last one predicts.

    Args:
        examples: what to lay out.
        positions: their positions in the split.
        layout: padded or packed.
        pad_id: id that fills rows up.
        kind: what the targets are.
        width: K, values an example has; read for an empty batch of values only.
        device: where the tensors go.
        left: pad on the left, for generation.
    """
    sequences = [part for example in examples for part in _sequences(example, kind)]
    if not sequences:
        sequences = [_Sequence([pad_id], [IGNORE])] * (2 if kind == "pair" else 1)
    lengths = borders = tuple(len(sequence.ids) for sequence in sequences)
    by_token = kind in ("token", "pair")
    one_row = layout.kind != "padded" and by_token
    if layout.division is not None:
        sequences += _filler(-sum(lengths) % layout.division.ranks, pad_id)
        borders = tuple(len(sequence.ids) for sequence in sequences)
    elif one_row and layout.few_sizes:
        sequences += _filler(filled_up(sum(lengths)) - sum(lengths), pad_id)
    columns = _joined(sequences, layout, pad_id) if one_row else _rows(sequences, pad_id, left, by_token)
    if layout.division is not None:
        columns = _part_of(columns, layout.division)
    token_targets, owners = columns.pop("targets"), columns.pop("owners")
    targets = to_device(token_targets if by_token else _example_targets(examples, kind, width), device)
    predicted = cache(partial(predicted_tokens, token_targets, owners, columns["input_ids"].shape[1], device))
    inputs: dict[str, Any] = {name: to_device(array, device) for name, array in columns.items()}
    if layout.kind != "padded":
        inputs |= _borders(borders, layout, device, one_row)
    return Batch(
        inputs, targets, to_device(owners, device), predicted, lengths, tuple(positions),
        tokens=sum(lengths) if examples else 0)


def rows_of(values: Tensor, batch: Batch, *, fill: float) -> Tensor:
    """Values of each token [B, T, ...], however they are laid out -> a row a sequence [S, longest, ...]."""
    if values.shape[0] == len(batch.lengths):
        return values
    real = values[0, : sum(batch.lengths)]
    return pad_sequence(list(real.split(list(batch.lengths))), batch_first=True, padding_value=fill)


@dataclass(frozen=True, slots=True)
class _Sequence:
    ids: Sequence[int]
    targets: Sequence[float]
    segment_ids: Sequence[int] | None = None


def _sequences(example: Example, kind: TargetKind) -> list[_Sequence]:
    if kind != "pair":
        return [_Sequence(example.input_ids, example.targets, example.segment_ids)]
    cut = example.first_part
    return [_Sequence(example.input_ids[:cut], example.targets[:cut]),
            _Sequence(example.input_ids[cut:], example.targets[cut:])]


def _filler(tokens: int, pad_id: int) -> list[_Sequence]:
    """Of one token each: together they may be longer than a model's table of positions."""
    return [_Sequence([pad_id], [IGNORE])] * tokens


def _part_of(columns: Mapping[str, np.ndarray], division: Division) -> dict[str, np.ndarray]:
    tokens = columns["input_ids"].shape[1] // division.ranks
    begin = tokens * division.place
    return {name: column[:, begin : begin + tokens + (name in ("targets", "owners"))]
            for name, column in columns.items()}


def _rows(sequences: Sequence[_Sequence], pad_id: int, left: bool, by_token: bool) -> dict[str, np.ndarray]:
    shape = len(sequences), max(len(sequence.ids) for sequence in sequences)
    ids, mask, segments = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    targets = np.full(shape if by_token else (0, 0), IGNORE, np.int64)
    for row, sequence in enumerate(sequences):
        length = len(sequence.ids)
        span = slice(shape[1] - length, shape[1]) if left else slice(0, length)
        ids[row, span] = sequence.ids
        mask[row, span] = 1
        if sequence.segment_ids is not None:
            segments[row, span] = sequence.segment_ids
        if by_token and len(sequence.targets):  # prompts to generate from have none
            targets[row, span] = sequence.targets
    columns = {"input_ids": ids, "attention_mask": mask, "targets": targets,
               "owners": np.broadcast_to(np.arange(shape[0])[:, None], shape).copy()}
    if any(sequence.segment_ids is not None for sequence in sequences):
        columns["token_type_ids"] = segments
    return columns


def _joined(sequences: Sequence[_Sequence], layout: Layout, pad_id: int) -> dict[str, np.ndarray]:
    lengths = [len(sequence.ids) for sequence in sequences]
    columns = {
        "input_ids": np.concatenate([np.asarray(sequence.ids, np.int64) for sequence in sequences]),
        "position_ids": np.concatenate([np.arange(length) for length in lengths]) + layout.first_position,
        "targets": np.concatenate([np.asarray(sequence.targets, np.int64) for sequence in sequences]),
        "owners": np.repeat(np.arange(len(lengths)), lengths),
    }
    if any(sequence.segment_ids is not None for sequence in sequences):
        columns["token_type_ids"] = np.concatenate([
            np.zeros(len(sequence.ids), np.int64) if sequence.segment_ids is None
            else np.asarray(sequence.segment_ids, np.int64) for sequence in sequences])
    return {name: column[None].astype(np.int64, copy=False) for name, column in columns.items()}


def _borders(lengths: tuple[int, ...], layout: Layout, device: torch.device, one_row: bool) -> dict[str, Any]:
    """What tells the attention where sequences end. Made once a batch, not once a layer."""
    if layout.kind == "varlen" and one_row:
        ends = ends_of(lengths, device)
        longest = max(lengths)
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    # a mask that is ready for use keeps transformers from building one of T x T
    ready = {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)} if one_row else {}
    exchange = {} if layout.division is None else {"exchange": layout.division.exchange}
    on_device = {"segment_ends": ends_of(lengths, device)} if layout.at_once else {}
    return {"segment_lengths": lengths, **on_device, **ready, **exchange}


def _example_targets(examples: Sequence[Example], kind: TargetKind, width: int) -> np.ndarray:
    if kind == "values":
        if not examples:
            return np.full((1, width), np.nan, dtype=np.float32)
        return np.asarray([example.targets for example in examples], dtype=np.float32)
    return np.asarray([example.targets[0] for example in examples] or [IGNORE], dtype=np.int64)
