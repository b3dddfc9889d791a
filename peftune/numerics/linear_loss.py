"""Cross-entropy from hidden states, without the logits of all tokens at once.

Shape letters: N supervised tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from peftune.numerics.few_shapes import filled_up, makes_code_slowly
from peftune.numerics.losses import token_cross_entropy

Head = Callable[[Tensor], Tensor]
"""Hidden states [n, D] -> logits [n, V], each row by itself."""

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**26}
"""Logits that exist at once, by device: on CPUs about what caches hold, on GPUs what fills the device with work."""


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits may exist at once."""
    return max(1, CHUNK_LOGITS.get(device.type, CHUNK_LOGITS["cuda"]) // vocabulary)


def head_cross_entropy(head: Head, hidden_ND: Tensor, ids_N: Tensor, *, rows: int) -> Tensor:
    """Cross-entropy of each token, in nats, [N] float32, from logits of `rows` tokens at a time.

    Where the head does not train, its part of the gradient is computed in the forward pass, while a chunk's logits
    are there: a token's loss depends on its own hidden state alone, so the gradient that comes down later only scales
    that row. A head that trains computes each chunk's logits a second time in backward.

    Source: the chunks and the gradient in the forward pass of Liger Kernel (Hsu et al., 2024, arXiv:2410.10989); there
    one loss for all tokens is scaled, here each token's own.

    Args:
        head: output layer and all that follows it.
        hidden_ND: last hidden states of the supervised tokens, any float dtype.
        ids_N: the tokens they predict, int64.
        rows: tokens of a chunk.
    """
    tokens = len(ids_N)
    if hidden_ND.device.type == "cpu" and makes_code_slowly(_product_dtype(hidden_ND)):
        missing = filled_up(tokens) - tokens
        hidden_ND, ids_N = pad(hidden_ND, (0, 0, 0, missing)), pad(ids_N, (0, missing))
    return _in_chunks(head, hidden_ND, ids_N, rows)[:tokens]


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _in_chunks(head: Head, hidden_ND: Tensor, ids_N: Tensor, rows: int) -> Tensor:
    if torch.is_grad_enabled() and not head(hidden_ND[:0].detach()).requires_grad and hidden_ND.requires_grad:
        nats: Tensor = _FrozenHead.apply(hidden_ND, ids_N, head, rows)
        return nats
    parts = list(zip(hidden_ND.split(rows), ids_N.split(rows), strict=True))
    if not torch.is_grad_enabled() or len(parts) == 1:
        return torch.cat([token_cross_entropy(head(hidden), ids) for hidden, ids in parts])

    def part(hidden: Tensor, ids: Tensor) -> Tensor:
        return token_cross_entropy(head(hidden), ids)

    return torch.cat([checkpoint(part, hidden, ids, use_reentrant=False) for hidden, ids in parts])


class _FrozenHead(torch.autograd.Function):
    """Keeps [N, D] for backward: the gradient of each token's loss with respect to its hidden state."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, ids_N: Tensor, head: Head, rows: int) -> Tensor:
        nats, slopes = [], []
        for part, ids in zip(hidden_ND.split(rows), ids_N.split(rows), strict=True):
            with torch.enable_grad():
                hidden = part.detach().requires_grad_()
                logits = head(hidden)
            losses, slope = _loss_and_slope(logits.detach(), ids)
            nats.append(losses)
            slopes += torch.autograd.grad(logits, hidden, slope)
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(nats)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (slope_ND,) = ctx.saved_tensors
        (gradient_N,) = gradients
        return (slope_ND * gradient_N[:, None]).to(slope_ND.dtype), None, None, None


def _loss_and_slope(logits_nV: Tensor, ids_n: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies [n], and their derivatives by the logits: probabilities, less 1 at the token itself."""
    wide_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32), copy=True)
    at = torch.arange(len(ids_n), device=ids_n.device)
    largest_n, own_n = wide_nV.amax(-1), wide_nV[at, ids_n]
    slope_nV = wide_nV.sub_(largest_n[:, None]).exp_()
    total_n = slope_nV.sum(-1)
    slope_nV.div_(total_n[:, None])
    slope_nV[at, ids_n] -= 1
    return largest_n + total_n.log() - own_n, slope_nV.to(logits_nV.dtype)
