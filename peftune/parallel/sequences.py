"""Sequences divided among neighbouring ranks, for those that one device cannot hold.

Each rank computes everything that looks at one token at a time for its part of a row. Around attention an exchange
gives it all tokens, for a part of the heads, and takes them back after it.

Source: Jacobs et al., 2023, arXiv:2309.14509 (Ulysses).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peftune.errors import Fault, MachineError
from peftune.parallel.names import sequence_ranks
from peftune.parallel.world import World


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """The ranks that share each row, and this one among them: a `Division` of `data/layouts.py`."""

    place: int
    """Which part of each row this rank holds, from 0."""
    ranks: int
    """How many share a row, N."""
    group: Any
    """torch's process group. Its exchanges do not mix with those of gradients, which run at the same time."""

    def exchange(self, parts: Tensor) -> Tensor:
        """[N, ...], whose part i is for the rank at place i -> [N, ...], whose part i came from there. Differentiable.

        All ranks of the group call it with equal shapes.
        """
        exchanged: Tensor = _Exchange.apply(parts, self.group)
        return exchanged

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over the group, on each of its ranks."""
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=self.group)
        return tensor


class _Exchange(torch.autograd.Function):
    """Part j of rank i becomes part i of rank j. Done twice, all is where it was: it is its own derivative."""

    @staticmethod
    def forward(context: Any, parts: Tensor, group: Any) -> Tensor:
        context.group = group
        sent = parts.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return received

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        back: Tensor = _Exchange.apply(gradients[0], context.group)
        return back, None


def open_sequences(world: World) -> SequenceGroup | None:
    """The group that the launcher's environment asks for; None where sequences stay whole. All ranks call it.

    Raises:
        MachineError: the processes do not form groups of that size.
    """
    ranks = sequence_ranks()
    if ranks == 1:
        return None
    if world.ranks % ranks:
        raise MachineError(Fault(
            kind="environment", message=f"{world.ranks} processes form no groups of {ranks} that share sequences",
            mend=f"--processes {-(-world.ranks // ranks) * ranks}, or another --sequence-parallel"))
    group, _ = dist.new_subgroups(group_size=ranks)
    return SequenceGroup(world.rank % ranks, ranks, group)
