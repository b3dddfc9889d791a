"""Attention of short sequences in bfloat16 on CPUs, many of them at a time.

torch 2.13's kernel for CPUs takes each sequence and head by itself, at a fixed cost; most of all backward, in bfloat16.
Here sequences of like length lie side by side, filled up to the longest, and their scores, outputs and gradients are
products of batches of matrices. Scores and their softmax are computed in float32, and again in backward, so that query,
key and value are all that is kept, as torch's kernel does (Dao et al., 2022, arXiv:2205.14135, without its tiles).
`peftune bench step` measures the gain.

Shape letters: T tokens, H heads of the query, K heads of key and value, G = H / K, D head size; N sequences of a group,
L the length of its longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORT = 512
"""Tokens of the longest sequences that are taken together; torch's kernel is as fast beyond."""
FILLED = 1.25
"""The longest of a group is at most so many times its shortest."""
SCORES = 2**20
"""Scores of a group at most, over all heads: about what caches hold."""
SCORES_ALONE = 2**22
"""Scores that a single sequence may have: its 16 MiB in float32 exist some four times at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Sequences of like length."""

    longest: int
    rows_NL: np.ndarray
    """Tokens of each sequence; its last one again where it is filled up."""
    real: np.ndarray
    """Positions in the flattened rows that are no filling."""
    filling: np.ndarray
    """All others."""
    tokens: np.ndarray
    """Tokens at the real positions: each of the group's once."""
    lengths_N: np.ndarray


@lru_cache(maxsize=64)
def groups_of(lengths: tuple[int, ...], heads: int) -> tuple[Group, ...]:
    """Sequences that lie end to end, in groups. The same for every layer of a batch."""
    starts = np.cumsum([0, *lengths[:-1]])
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[found[-1][0]] if found else 0
        if not found or longest > FILLED * lengths[i] or (len(found[-1]) + 1) * heads * longest**2 > SCORES:
            found.append([])
        found[-1].append(i)
    groups = []
    for members in found:
        lengths_N, longest = np.array([lengths[i] for i in members]), lengths[members[0]]
        at_L = np.arange(longest)
        rows_NL = starts[members][:, None] + np.minimum(at_L, lengths_N[:, None] - 1)
        is_real = (at_L < lengths_N[:, None]).ravel()
        groups.append(Group(longest, rows_NL, np.flatnonzero(is_real), np.flatnonzero(~is_real),
                            rows_NL.ravel()[is_real], lengths_N))
    return tuple(groups)


def longest_taken(query: Tensor, key: Tensor, value: Tensor, *, dropout: float, window: int | None) -> int:
    """Tokens of the longest sequence that `attend_short` is the faster way for; 0 if for none.

    Args:
        query, key, value: of the attention.
        dropout: of its weights.
        window: tokens that a layer sees around each one, if not all.
    """
    fits = query.device.type == "cpu" and all(x.dtype == torch.bfloat16 for x in (query, key, value)) and not dropout
    return min(SHORT, isqrt(SCORES_ALONE // query.shape[1]), window or SHORT) if fits else 0


def attend_short(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], *, scale: float, causal: bool
) -> Tensor:
    """softmax(scale q k^T) v of each sequence by itself.

    Args:
        query: [1, H, T, D] bfloat16, sequences end to end.
        key, value: [1, K, T, D].
        lengths: tokens of each sequence.
        scale: of the scores.
        causal: a token sees none after it.

    Returns:
        [1, T, H, D] bfloat16.
    """
    output: Tensor = _ShortAttention.apply(query, key, value, tuple(lengths), scale, causal)
    return output


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float, causal: bool
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.lengths, ctx.scale, ctx.causal = lengths, scale, causal
        heads, shared = query.shape[1], key.shape[1]
        output_THD = query.new_empty(query.shape[2], heads, value.shape[3])
        with torch.autocast("cpu", enabled=False):
            for group in groups_of(lengths, heads):
                q, k, v = (_taken(x, group, shared) for x in (query, key, value))
                weights = _weights(q, k, group, scale, causal)
                _put(output_THD, torch.bmm(weights.to(q.dtype), v), group)
        return output_THD[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value = ctx.saved_tensors
        heads, shared = query.shape[1], key.shape[1]
        slopes_T = [x.new_empty(x.shape[2], x.shape[1], x.shape[3]) for x in (query, key, value)]
        output_slope = gradients[0].transpose(1, 2)
        with torch.autocast("cpu", enabled=False):
            for group in groups_of(ctx.lengths, heads):
                q, k, v = (_taken(x, group, shared) for x in (query, key, value))
                slope = _taken(output_slope, group, shared, blank=True)
                weights = _weights(q, k, group, ctx.scale, ctx.causal)
                of_weights = torch.bmm(slope, v.transpose(1, 2)).float()
                of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, torch.float32)
                of_scores = of_scores.mul_(ctx.scale).to(q.dtype)
                for whole, part in zip(slopes_T, (
                        torch.bmm(of_scores, k), torch.bmm(of_scores.transpose(1, 2), q),
                        torch.bmm(weights.to(q.dtype).transpose(1, 2), slope)), strict=True):
                    _put(whole, part, group)
        query_slope, key_slope, value_slope = (slope.transpose(0, 1)[None] for slope in slopes_T)
        return query_slope, key_slope, value_slope, None, None, None


def _weights(q: Tensor, k: Tensor, group: Group, scale: float, causal: bool) -> Tensor:
    """q [N K, G L, D], k [N K, L, D] -> softmax of the scores, [N K, G L, L] float32."""
    if causal:  # what fills a sequence up comes after all of it
        mask = torch.full((group.longest, group.longest), -torch.inf).triu_(1).repeat(q.shape[1] // group.longest, 1)
    else:
        beyond_NL = torch.from_numpy(np.arange(group.longest) >= group.lengths_N[:, None])
        mask_NL = torch.zeros(beyond_NL.shape).masked_fill_(beyond_NL, -torch.inf)
        mask = mask_NL.repeat_interleave(len(q) // len(mask_NL), 0)[:, None]
    return torch.baddbmm(mask, q.float(), k.float().transpose(1, 2), alpha=scale).softmax(-1)


def _taken(x_1HTD: Tensor, group: Group, shared: int, *, blank: bool = False) -> Tensor:
    """The group's tokens, [1, H, T, D] -> [N K, G L, D]; zeros instead of what fills up, if `blank`."""
    _, heads, _, size = x_1HTD.shape
    rows = x_1HTD[0].transpose(0, 1).index_select(0, torch.from_numpy(group.rows_NL.ravel()))
    if blank and len(group.filling):
        rows.index_fill_(0, torch.from_numpy(group.filling), 0)
    rows_NLKGD = rows.view(*group.rows_NL.shape, shared, heads // shared, size)
    return rows_NLKGD.permute(0, 2, 3, 1, 4).reshape(len(group.rows_NL) * shared, -1, size)


def _put(whole_THD: Tensor, part: Tensor, group: Group) -> None:
    """[N K, G L, D] into the rows of the group's tokens."""
    (sequences, longest), (_, heads, size) = group.rows_NL.shape, whole_THD.shape
    rows_NKGLD = part.view(sequences, part.shape[0] // sequences, part.shape[1] // longest, longest, size)
    rows = rows_NKGLD.permute(0, 3, 1, 2, 4).reshape(-1, heads, size)
    if len(group.filling):
        rows = rows.index_select(0, torch.from_numpy(group.real))
    whole_THD.index_copy_(0, torch.from_numpy(group.tokens), rows)
