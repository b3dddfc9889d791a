"""Attention of packed sequences in bfloat16 on CPUs, many of them at a time.

Sequences of like length lie side by side, filled up to the longest. Forward is torch's flash kernel (Dao et al., 2022,
arXiv:2205.14135). Its backward takes each sequence and head by itself, at a fixed cost that short ones do not earn;
theirs are products of batches of matrices instead, with scores and softmax computed anew in float32. `peftune bench
step` measures the gain.

Shape letters: T tokens, H heads of the query, K heads of key and value, G = H / K, D head size; N sequences of a group,
L the length it is filled up to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORT = 256
"""Tokens of the longest sequences whose backward is products of batches; the kernel's is as fast beyond."""
FILLED = 1.25
"""A group is filled up to at most so many times its shortest sequence, before rounding."""
ROUND = 8
"""Lengths of groups are multiples: oneDNN makes code for each shape of products, which takes milliseconds."""
SCORES = 2**20
"""Scores of a group at most, over all heads: about what caches hold."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Sequences of like length."""

    length: int
    """Tokens that each is filled up to."""
    rows_NL: np.ndarray
    """Tokens of each sequence; its last one again where it is filled up."""
    span: slice | None
    """All of them, where they follow one another as they are."""
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
        length = longest if longest > SHORT else longest + -longest % ROUND
        at_L = np.arange(length)
        rows_NL = starts[members][:, None] + np.minimum(at_L, lengths_N[:, None] - 1)
        is_real = (at_L < lengths_N[:, None]).ravel()
        begin, end = int(rows_NL[0, 0]), int(rows_NL[0, 0]) + rows_NL.size
        span = slice(begin, end) if np.array_equal(rows_NL.ravel(), np.arange(begin, end)) else None
        groups.append(Group(length, rows_NL, span, np.flatnonzero(is_real), np.flatnonzero(~is_real),
                            rows_NL.ravel()[is_real], lengths_N))
    return tuple(groups)


def attends(query: Tensor, key: Tensor, value: Tensor, longest: int, *, dropout: float, window: int | None) -> bool:
    """Whether `attend` is the way for these.

    Args:
        query, key, value: of the attention.
        longest: tokens of the longest sequence.
        dropout: of its weights.
        window: tokens that a layer sees around each one, if not all.
    """
    fits = query.device.type == "cpu" and all(x.dtype == torch.bfloat16 for x in (query, key, value)) and not dropout
    return fits and query.shape[3] == value.shape[3] and (window is None or longest <= window)


def attend(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], *, scale: float, causal: bool
) -> Tensor:
    """softmax(scale q k^T) v of each sequence by itself.

    Args:
        query: [1, H, T, D] bfloat16, sequences end to end. Tokens behind the last sequence get zeros.
        key, value: [1, K, T, D].
        lengths: tokens of each sequence.
        scale: of the scores.
        causal: a token sees none after it.

    Returns:
        [1, T, H, D] bfloat16.
    """
    output: Tensor = _Attention.apply(query, key, value, tuple(lengths), scale, causal)
    return output


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float, causal: bool
    ) -> Tensor:
        groups = groups_of(lengths, query.shape[1])
        output_THD = _blank(query, value.shape[3], lengths)
        sums = []
        with torch.autocast("cpu", enabled=False):
            for group in groups:
                q, k, v = (_taken(x, group) for x in (query, key, value))
                output_NHLD, sums_NHL = _forward(q, k, v, 0.0, causal, attn_mask=_mask(group, causal), scale=scale)
                sums += [sums_NHL] if group.length > SHORT else []
                _put(output_THD, output_NHLD.transpose(1, 2), group)
        ctx.save_for_backward(query, key, value, output_THD, *sums)
        ctx.groups, ctx.lengths, ctx.scale, ctx.causal = groups, lengths, scale, causal
        return output_THD[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, output_THD, *sums = ctx.saved_tensors
        slopes = [_blank(x, x.shape[3], ctx.lengths) for x in (query, key, value)]
        output_slope, output = gradients[0].transpose(1, 2), output_THD[None].transpose(1, 2)
        left = iter(sums)
        with torch.autocast("cpu", enabled=False):
            for group in ctx.groups:
                q, k, v = (_taken(x, group) for x in (query, key, value))
                slope = _taken(output_slope, group, blank=True)
                if group.length > SHORT:
                    parts = _backward(slope, q, k, v, _taken(output, group), next(left), 0.0, ctx.causal,
                                      attn_mask=_mask(group, ctx.causal), scale=ctx.scale)
                else:
                    parts = _slopes(q, k, v, slope, group, ctx.scale, ctx.causal)
                for whole, part in zip(slopes, parts, strict=True):
                    _put(whole, part.transpose(1, 2), group)
        query_slope, key_slope, value_slope = (slope.transpose(0, 1)[None] for slope in slopes)
        return query_slope, key_slope, value_slope, None, None, None


def _slopes(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, group: Group, scale: float, causal: bool
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, [N, heads, L, D], from those of the output [N, H, L, D]."""
    shared = k.shape[1]
    q, slope = (x.unflatten(1, (shared, -1)).flatten(0, 1).flatten(1, 2) for x in (q, slope))
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    weights = _weights(q, k, group, scale, causal)
    of_weights = torch.bmm(slope, v.transpose(1, 2)).float()
    of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, torch.float32)
    of_scores = of_scores.mul_(scale).to(q.dtype)
    parts = (torch.bmm(of_scores, k), torch.bmm(of_scores.transpose(1, 2), q),
             torch.bmm(weights.to(q.dtype).transpose(1, 2), slope))
    return tuple(part.view(len(group.rows_NL), -1, group.length, part.shape[2]) for part in parts)


def _weights(q: Tensor, k: Tensor, group: Group, scale: float, causal: bool) -> Tensor:
    """q [N K, G L, D], k [N K, L, D] -> softmax of the scores, [N K, G L, L] float32."""
    if causal:  # what fills a sequence up comes after all of it
        mask = torch.full((group.length, group.length), -torch.inf).triu_(1).repeat(q.shape[1] // group.length, 1)
    else:
        mask = _filling_mask(group).repeat_interleave(len(q) // len(group.rows_NL), 0)[:, None]
    return torch.baddbmm(mask, q.float(), k.float().transpose(1, 2), alpha=scale).softmax(-1)


def _mask(group: Group, causal: bool) -> Tensor | None:
    """[N, 1, 1, L] of the kernel, where a sequence would see what fills it up."""
    return None if causal or not len(group.filling) else _filling_mask(group)[:, None, None]


def _filling_mask(group: Group) -> Tensor:
    """[N, L] float32, to be added to scores."""
    beyond_NL = torch.from_numpy(np.arange(group.length) >= group.lengths_N[:, None])
    return torch.zeros(beyond_NL.shape).masked_fill_(beyond_NL, -torch.inf)


def _blank(like: Tensor, size: int, lengths: Sequence[int]) -> Tensor:
    """[T, heads, size], to be written by `_put`; zeros behind the last sequence."""
    blank = like.new_empty(like.shape[2], like.shape[1], size)
    blank[sum(lengths):] = 0
    return blank


def _taken(x_1HTD: Tensor, group: Group, *, blank: bool = False) -> Tensor:
    """The group's tokens, [1, H, T, D] -> [N, H, L, D], where a token's heads lie side by side; zeros instead of what
    fills up, if `blank`."""
    whole_THD = x_1HTD[0].transpose(0, 1)
    if group.span is not None:
        return whole_THD[group.span].unflatten(0, group.rows_NL.shape).transpose(1, 2)
    rows = whole_THD.index_select(0, torch.from_numpy(group.rows_NL.ravel()))
    if blank and len(group.filling):
        rows.index_fill_(0, torch.from_numpy(group.filling), 0)
    return rows.view(*group.rows_NL.shape, *rows.shape[1:]).transpose(1, 2)


def _put(whole_THD: Tensor, part_NLHD: Tensor, group: Group) -> None:
    """The group's tokens to where they belong."""
    rows = part_NLHD.flatten(0, 1)
    if group.span is not None:
        whole_THD[group.span] = rows
        return
    if len(group.filling):
        rows = rows.index_select(0, torch.from_numpy(group.real))
    whole_THD.index_copy_(0, torch.from_numpy(group.tokens), rows)
