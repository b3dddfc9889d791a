"""Made-up sequences for proofs on the very model that trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftune.errors import in_a_line, out_of_memory

UNPROVEN = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError)
"""What a model's own code raises that cannot be run in the way that is to be proven."""


def why_unproven(error: BaseException) -> str:
    """Such an error in a line. A lack of memory says nothing of the model: it is raised again."""
    if out_of_memory(error):
        raise error
    return in_a_line(error)


def random_sequences(lengths: Sequence[int], *, vocabulary: int, padding: int) -> list[list[int]]:
    """Ids below `vocabulary`, the same each time; never `padding`, since some models look for it."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(vocabulary - 1, (length,), generator=generator) for length in lengths]
    return [(ids + (ids >= padding)).tolist() for ids in drawn]
