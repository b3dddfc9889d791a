"""Attention of packed sequences on a GPU, all of them in one call of torch's flash kernel.

Sequence by sequence, a layer would start as many kernels as there are lengths, each too small to fill the device. This
needs no package beside torch. Source: Dao, 2023, arXiv:2307.08691.

Shape letters: T tokens, H heads of the query, K heads of key and value, D head size, N sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig

from peftune.model.proof import UNPROVEN, why_unproven
from peftune.numerics.transfer import ends_of

WIDEST = 256
"""Head sizes that the kernel takes."""
TOLERANCE = 5e-2
"""Largest difference from float32 in the proof, as a share of the largest number: rounding to 8 bits is below it, a
wrong border, window or head far beyond."""
TRIED_LENGTHS, TRIED_WINDOW = (1, 2, 67, 130), 16


def takes(query: Tensor, key: Tensor, value: Tensor, tokens: int, *, dropout: float) -> bool:
    """Whether `attend` is the way for these. `tokens`: of all sequences."""
    fits = query.shape[3] == value.shape[3] <= WIDEST and query.shape[2] == tokens and not dropout
    return fits and all(_product_type(x) != torch.float32 for x in (query, key, value))


def attend(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, *, scale: float | None, causal: bool,
    window: int | None,
) -> Tensor:
    """Attention within each sequence.

    Args:
        query: [1, H, T, D], 16-bit, or about to be under autocast.
        key, value: [1, K, T, D]; H is a multiple of K.
        ends: int32 [N + 1] on the device, 0 and the sum of the lengths up to each sequence's end.
        longest: tokens of the longest sequence.
        scale: of the scores; None is 1 / sqrt(D).
        causal: each token sees those before it, and itself; else all.
        window: of those, the ones nearer than so many tokens.

    Returns:
        [1, T, H, D], in the products' type.
    """
    q, k, v = (x[0].transpose(0, 1).to(_product_type(x)) for x in (query, key, value))
    before = -1 if window is None else window - 1
    output = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, enable_gqa=True,
                         window_size=(before, 0 if causal else before))
    assert isinstance(output, Tensor)  # asked for more, it gives more
    return output[None]


def _product_type(states: Tensor) -> torch.dtype:
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def kernel_fault(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Prove on random numbers that the kernel's results and gradients are those of float32 sequences, each alone, for
    such heads as the model has; else say what differs.

    Args:
        config: of the model.
        device: to run on.
        dtype: of the products.
    """
    if dtype == torch.float32:
        return "the kernel does not take float32"
    text = config.get_text_config()
    try:
        heads, width = int(text.num_attention_heads), int(text.hidden_size)
    except (AttributeError, TypeError):
        return "its layers have no common number of attention heads"
    more = text.to_dict()
    groups, size = more.get("num_key_value_heads") or heads, more.get("head_dim") or width // heads
    generator = torch.Generator().manual_seed(0)
    tokens = sum(TRIED_LENGTHS)
    query, key, value = (torch.randn(1, n, tokens, size, generator=generator).to(device, dtype)
                         for n in (heads, groups, groups))
    slope = torch.randn(1, tokens, heads, size, generator=generator).to(device, dtype)
    try:
        for causal in (True, False):
            for window in (None, TRIED_WINDOW):
                fault = _difference((query, key, value), slope, causal=causal, window=window)
                if fault is not None:
                    return fault
    except UNPROVEN as error:
        return why_unproven(error)
    return None


def _difference(
    states: tuple[Tensor, Tensor, Tensor], slope: Tensor, *, causal: bool, window: int | None
) -> str | None:
    ends = ends_of(TRIED_LENGTHS, slope.device)
    query, key, value = ours = [x.detach().requires_grad_() for x in states]
    theirs = [x.detach().float().requires_grad_() for x in states]
    with torch.autocast(slope.device.type, enabled=False), torch.enable_grad():
        found = attend(query, key, value, ends, max(TRIED_LENGTHS), scale=None, causal=causal, window=window)
        expected = _each_alone(*theirs, causal=causal, window=window)
        pairs = [("results", found, expected)]
        pairs += zip(("gradients of queries", "gradients of keys", "gradients of values"),
                     torch.autograd.grad(found, ours, slope), torch.autograd.grad(expected, theirs, slope.float()),
                     strict=True)
    for name, mine, other in pairs:
        largest, deviation = other.abs().max().item(), (mine.float() - other).abs().max().item()
        if not deviation <= TOLERANCE * largest:
            return f"the kernel's {name} differ by {deviation:.3g} (largest {largest:.3g})"
    return None


def _each_alone(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, window: int | None) -> Tensor:
    parts = zip(*(x.split(list(TRIED_LENGTHS), dim=2) for x in (query, key, value)), strict=True)
    outputs = []
    for q, k, v in parts:
        at = torch.arange(q.shape[2], device=q.device)
        distance = at[:, None] - at[None, :]
        seen = (distance >= 0) if causal else torch.ones_like(distance, dtype=torch.bool)
        seen = seen if window is None else seen & (distance.abs() < window)
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True))
    return torch.cat(outputs, dim=2).transpose(1, 2)
