"""Losses as sums, one number an example: whoever holds the global target count divides, once.

They are float32, or float64 where the logits are.

Shape letters: B rows, T tokens, N supervised ones, V vocabulary, K classes, S sequences: a padded row holds
one, a packed one several.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peftune.numerics.transfer import to_device

IGNORE = -100
"""Target id of a position outside the loss; the value that torch's cross-entropy skips."""


def _wide(tensor: Tensor) -> Tensor:
    """At least float32; float64 stays, so that references can be exact."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True, slots=True)
class Predicted:
    """The supervised tokens of a batch, each with the position that predicts it. N tokens."""

    rows_N: Tensor
    """Row of the position, int64."""
    columns_N: Tensor
    """Its place in the row, from the end: -1 is the last one. So it holds whatever a model puts in front."""
    ids_N: Tensor
    """The token that it predicts."""
    owners_N: Tensor
    """The sequence that both belong to."""


def predicted_tokens(targets_BT: np.ndarray, owners_BT: np.ndarray, tokens: int, device: torch.device) -> Predicted:
    """Position t predicts t + 1 where both belong to one sequence and the latter is supervised.

    So the first token of a sequence is never predicted from the end of the one before it.

    Args:
        targets_BT: unshifted target ids, int64; IGNORE marks tokens outside the loss. They may reach one token further
            than what the model reads: where a row is cut, its last token predicts the first one of the next part.
        owners_BT: sequence that each token belongs to, int64, for the same tokens.
        tokens: that the model reads of each row.
        device: of the result. It is found in host memory: a GPU asked for it would first do all that it has been given.
    """
    next_BT = targets_BT[:, 1:]
    rows_N, columns_N = np.nonzero((next_BT != IGNORE) & (owners_BT[:, 1:] == owners_BT[:, :-1]))
    return Predicted(to_device(rows_N, device), to_device(columns_N - tokens, device),
                     to_device(next_BT[rows_N, columns_N], device), to_device(owners_BT[rows_N, columns_N], device))


def sums_by_sequence(nats_N: Tensor, owners_N: Tensor, sequences: int) -> Tensor:
    """[N] -> [sequences]: the nats of each sequence's tokens, added up."""
    return nats_N.new_zeros(sequences).index_add(0, owners_N, nats_N)


def token_cross_entropy(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    """Cross-entropy of each token, in nats, [N] float32."""
    return F.cross_entropy(_wide(logits_NV), ids_N, reduction="none")


def token_nats(logits_BTK: Tensor, targets_BT: Tensor, owners_BT: Tensor, sequences: int) -> Tensor:
    """Cross-entropy of the class of each token itself, in nats, summed by sequence.

    Args:
        logits_BTK: any float dtype.
        targets_BT: class ids, int64; IGNORE marks tokens outside the loss.
        owners_BT: sequence that each token belongs to, int64; any number from S on where there is no target.
        sequences: their number, S.

    Returns:
        [S] float32.
    """
    nats = F.cross_entropy(_wide(logits_BTK).flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE, reduction="none")
    # what fills a row up belongs to a sequence beyond the last, and has no loss
    return sums_by_sequence(nats, owners_BT.flatten().clamp(max=sequences - 1), sequences)


CANDIDATE, START, END = 0, 1, 2
"""Marks of a token in extractive question answering: it may begin or end an answer; it begins it; it ends it. They
add up."""


def span_nats(logits_BT2: Tensor, marks_BT: Tensor) -> Tensor:
    """Mean of the cross-entropies of an answer's first and last token, in nats.

    Each is a choice among the candidate tokens of its row (Devlin et al., 2019, arXiv:1810.04805, section 4.2).

    Args:
        logits_BT2: scores as first and as last token, any float dtype.
        marks_BT: CANDIDATE plus START plus END, or IGNORE for tokens that no answer may hold, int64.

    Returns:
        [B] float32; 0 for rows without a marked answer.
    """
    marks_BT = marks_BT.to(torch.int8)  # what is worked out of them takes an eighth of the memory
    wide_BT2 = _wide(logits_BT2).masked_fill((marks_BT == IGNORE)[..., None], -torch.inf)
    sides_B = []
    for side, mark in enumerate((START, END)):
        chosen_BT = (marks_BT > 0) & (marks_BT & mark > 0)
        nats_BT = wide_BT2[..., side].logsumexp(-1)[:, None] - wide_BT2[..., side]
        sides_B.append(nats_BT.masked_fill(~chosen_BT, 0.0).sum(-1))
    return (sides_B[0] + sides_B[1]) / 2


def preference_nats(log_probabilities_B4: Tensor, beta: float) -> Tensor:
    """Direct preference optimisation: -log sigmoid(beta ((c - c_ref) - (r - r_ref))), in nats.

    Source: Rafailov et al., 2023, arXiv:2305.18290, equation 7.

    Args:
        log_probabilities_B4: of chosen (c) and rejected (r) completion under the model, then under the reference.
        beta: strength of the tie to the reference.

    Returns:
        [B] in the dtype of its input.
    """
    return -F.logsigmoid(beta * preference_margins(log_probabilities_B4))


def preference_margins(log_probabilities_B4: Tensor) -> Tensor:
    """(c - c_ref) - (r - r_ref), [B]: how much more than the reference the model prefers the chosen one, in nats."""
    chosen, rejected, chosen_reference, rejected_reference = log_probabilities_B4.unbind(-1)
    return (chosen - chosen_reference) - (rejected - rejected_reference)


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
