"""Whether a model's results for a row depend on the padding beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from peftune.errors import Fault, ModelError, in_a_line
from peftune.model.outputs import logits_of
from peftune.model.packing_proof import RELATIVE_TOLERANCE, Inputs
from peftune.model.proof import UNPROVEN, random_sequences, why_unproven

TRIED_TOKENS = 64
"""Of the longest row of the proof: what mixes padding in does so at any length."""
COUNTED = {torch.float32: 1.0, torch.bfloat16: 0.9}
"""The difference that so many of all places stay below is what counts. A router between experts may send single tokens
elsewhere where bfloat16 rounds in another order."""


@torch.no_grad()
def padding_fault(
    model: nn.Module, lay_out: Callable[[Sequence[Sequence[int]]], Inputs], *, longest: int, vocabulary: int,
    padding: int, dtype: torch.dtype, autocast: Callable[[], AbstractContextManager[None]], pooled: bool,
) -> str | None:
    """Prove on random tokens that rows padded to the longest give the logits that each gives alone; else say by how
    much they differ.

    Args:
        model: unwrapped, with its adapter, on its device.
        lay_out: sequences of ids -> inputs of the model, padded.
        longest: tokens of the longest example.
        vocabulary: ids are drawn below it.
        padding: the one id that is not drawn.
        dtype: of the matrix products, which decides what rounding may do.
        autocast: precision of the forward pass.
        pooled: logits are one row a sequence, not one a token.
    """
    most = max(2, min(longest, TRIED_TOKENS))
    lengths = (max(1, most // 4), max(1, most // 2), most)
    sequences = random_sequences(lengths, vocabulary=vocabulary, padding=padding)
    was_training = model.training
    model.eval()

    def rows(logits: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """[places, values] of each sequence, without those of a learned prompt in front."""
        return [row[None] if pooled else row[-max(lengths):][:length]
                for row, length in zip(logits, lengths, strict=True)]

    try:
        with autocast():
            together = rows(logits_of(model, lay_out(sequences)), lengths)
            alone = [rows(logits_of(model, lay_out([ids])), [len(ids)])[0] for ids in sequences]
    except UNPROVEN as error:
        _refuse_type(error, dtype)
        return why_unproven(error)
    finally:
        model.train(was_training)
    differences = torch.cat([(a - b).abs().amax(1) for a, b in zip(together, alone, strict=True)]).float()
    deviation = differences.quantile(COUNTED[dtype]).item()
    largest = max(row.abs().max().item() for row in alone)
    if not deviation <= RELATIVE_TOLERANCE[dtype] * largest:
        return f"padding changes logits by {deviation:.3g} (largest logit {largest:.3g})"
    return None


def _refuse_type(error: BaseException, dtype: torch.dtype) -> None:
    """Raise ModelError where a model's own code cannot compute in bfloat16, as far as torch says so."""
    if dtype == torch.bfloat16 and re.search("dtype|BFloat16|scalar type", str(error)):
        raise ModelError(Fault(
            kind="model", message=f"model.dtype = 'bfloat16': this model's code fails in it: {in_a_line(error)}",
            mend="model.dtype=float32")) from error
