"""A rank of a test: attention over exchanged heads, beside plain attention over the whole row; an adapter to divide."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peftune.model.division import attend_whole
from peftune.parallel.fsdp2 import Fsdp2
from peftune.parallel.sequences import SequenceGroup
from peftune.parallel.world import World

RANKS = 2


class Layer:
    """What an attention layer says of itself."""

    num_key_value_groups = 4
    is_causal = True


def attention(layer: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[1, H, T, D] -> [1, T, H, D], causal, by its formula."""
    key, value = (states.repeat_interleave(layer.num_key_value_groups, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:]).triu(1).bool()
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def attend_and_compare(rank: int, port: int, failures: Any) -> None:
    """Outputs and gradients of this rank's part of the row, in float64; what differs goes into `failures`."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    group = SequenceGroup(rank, RANKS, dist.group.WORLD)
    torch.manual_seed(0)
    states = [torch.randn(1, heads, 10, 3, dtype=torch.float64, requires_grad=True) for heads in (4, 1, 1)]
    asked = torch.randn(1, 10, 4, 3, dtype=torch.float64)
    whole = attention(Layer, *states)
    (whole * asked).sum().backward()
    parts = [tensor.detach().chunk(RANKS, 2)[rank].clone().requires_grad_() for tensor in states]
    output = attend_whole(attention, group.exchange, RANKS, Layer, *parts)
    (output * asked.chunk(RANKS, 1)[rank]).sum().backward()
    pairs = [(output, whole.chunk(RANKS, 1)[rank]), *((part.grad, tensor.grad.chunk(RANKS, 2)[rank])
                                                      for part, tensor in zip(parts, states, strict=True))]
    differences = [float((mine - theirs).abs().max()) for mine, theirs in pairs]
    if not max(differences) <= 1e-12:
        failures.put((rank, differences))
    dist.destroy_process_group()


def divide_and_compare(rank: int, port: int, failures: Any) -> None:
    """An adapter that began otherwise on each rank is the main process's after it was divided."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 6, bias=False), torch.nn.BatchNorm1d(6))
    model[0].requires_grad_(False)
    for tensor in (*model[1].parameters(), *model[2].parameters(), model[2].running_mean):
        torch.nn.init.constant_(tensor, 1.0 + rank)
    strategy = Fsdp2(World(rank, RANKS, rank, torch.device("cpu"), "gloo"))
    divided, _ = strategy.prepare(model, lambda placed: torch.optim.SGD(placed.parameters()))
    for name, tensor in strategy.gather(divided, frozen=False).items():
        if (name.startswith(("1.", "2.weight")) or name.endswith("mean")) and not bool((tensor == 1.0).all()):
            failures.put((rank, name, tensor.tolist()))
    if not bool((divided[2].running_mean == 1.0).all()):
        failures.put((rank, "running_mean", divided[2].running_mean.tolist()))
    dist.destroy_process_group()
