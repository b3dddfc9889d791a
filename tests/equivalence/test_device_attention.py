"""Attention that is told of all packed sequences at once equals attention of each alone. The kernels run on GPUs; here
their operators are answered by the formula, in the type that comes, so that all around them is tried to the last digit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import Library
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
)
from transformers.masking_utils import flash_attention_mask

from peftune.data.layouts import PADDED, Layout
from peftune.model.device_attention import attend, kernel_fault, takes
from peftune.model.packing import segment_attention, takes_cumulative_lengths, use_packing
from peftune.numerics.transfer import ends_of
from tests.equivalence.test_layouts import (
    CASES,
    FAMILIES,
    GROUPED,
    a_model,
    assert_equal,
    loss_and_gradients,
)
from tests.unit.test_sequences import Layer, Threads

CPU = torch.device("cpu")
AT_ONCE = Layout("segments", at_once=True)
FLASH = "flash_by_the_formula"


class Formula:
    """Forward and backward of attention (Dao, 2023, arXiv:2307.08691), sequence by sequence, with the operators'
    arguments. `spoilt`: what it gets wrong."""

    def __init__(self, spoilt: str = "") -> None:
        self.spoilt, self.calls = spoilt, 0

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, ends: Tensor, ends_k: Tensor, longest: int, longest_k: int,
        dropout: float, causal: bool, debug: bool, *, scale: float | None = None, window_size_left: int = -1,
        window_size_right: int = -1, **other: Any,
    ) -> tuple[Tensor, ...]:
        assert dropout == 0 and not any(x is not None for x in other.values()) and torch.equal(ends, ends_k)
        self.calls += 1
        output = torch.empty_like(query)
        sums = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float64)
        for span in self._spans(ends, longest):
            q, k, v = self._heads(query[span], key[span], value[span])
            scores = self._scores(q, k, scale, causal, window_size_left, window_size_right)
            sums[:, span] = scores.logsumexp(-1)
            output[span] = (scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype)
        return output, sums.float() if query.dtype != torch.float64 else sums, *(query.new_empty(0) for _ in range(3))

    def backward(
        self, slope: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor, ends: Tensor,
        ends_k: Tensor, longest: int, longest_k: int, dropout: float, causal: bool, state: Tensor, unused: Tensor, *,
        scale: float | None = None, window_size_left: int = -1, window_size_right: int = -1,
    ) -> tuple[Tensor, ...]:
        slopes = [torch.empty_like(x) for x in (query, key, value)]
        factor = scale or query.shape[2] ** -0.5
        for span in self._spans(ends, longest):
            q, k, v = self._heads(query[span], key[span], value[span])
            scores = self._scores(q, k, scale, causal, window_size_left, window_size_right)
            weights = (scores - sums[:, span, None].double()).exp()
            above = slope[span].transpose(0, 1).double()
            mean = (above * output[span].transpose(0, 1).double()).sum(-1, keepdim=True)
            inner = weights * (above @ v.transpose(1, 2) - mean)
            found = [inner @ k * factor, inner.transpose(1, 2) @ q * factor, weights.transpose(1, 2) @ above]
            for into, states in zip(slopes, found, strict=True):
                groups = states.unflatten(0, (into.shape[1], -1)).sum(1)
                into[span] = groups.transpose(0, 1).to(into.dtype)
        if self.spoilt == "gradient":
            slopes[1] *= 1.5
        return tuple(slopes)

    def _spans(self, ends: Tensor, longest: int) -> list[slice]:
        found = ends.tolist()
        assert ends.dtype == torch.int32 and longest == max(b - a for a, b in pairwise(found))
        if self.spoilt == "borders":
            found = [0, found[-1]]
        return [slice(a, b) for a, b in pairwise(found)]

    @staticmethod
    def _heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        times = query.shape[1] // key.shape[1]
        return (query.transpose(0, 1).double(),
                *(x.transpose(0, 1).double().repeat_interleave(times, 0) for x in (key, value)))

    def _scores(self, query: Tensor, key: Tensor, scale: float | None, causal: bool, left: int, right: int) -> Tensor:
        at = torch.arange(query.shape[1])
        distance = at[:, None] - at[None, :]
        left, right = left if left >= 0 else len(at), 0 if causal else right if right >= 0 else len(at)
        if self.spoilt == "window":
            left += 1
        scores = query @ key.transpose(1, 2) * (scale or query.shape[2] ** -0.5)
        return scores.masked_fill((distance > left) | (-distance > right), -math.inf)


@pytest.fixture
def formula() -> Iterator[Formula]:
    """torch's operators of the kernel, answered on the CPU, which has none."""
    found = Formula()
    library = Library("aten", "IMPL")
    library.impl("_flash_attention_forward", lambda *args, **kwargs: found.forward(*args, **kwargs), "CPU")
    library.impl("_flash_attention_backward", lambda *args, **kwargs: found.backward(*args, **kwargs), "CPU")
    yield found
    library._destroy()


def compared(mine: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert_equal(mine[0], other[0], "losses")
    assert mine[1].keys() == other[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in other[1].values())
    for name, gradient in other[1].items():
        assert_equal(mine[1][name], gradient, name, largest)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_losses_and_gradients_of_one_call_for_all_sequences_equal_padded_ones(
    family: str, task: str, formula: Formula
) -> None:
    model = a_model(family, task).double()
    padded = loss_and_gradients(model, task, PADDED)
    assert use_packing(model, pooled=task == "sequence_classification", first_position=0) == "segments"
    assert formula.calls == 0
    compared(loss_and_gradients(model, task, AT_ONCE), padded)
    assert formula.calls == FAMILIES[family]().num_hidden_layers


@pytest.mark.parametrize("window", [None, 3])
def test_ranks_that_share_a_row_call_it_for_their_heads(window: int | None, formula: Formula) -> None:
    torch.manual_seed(0)
    lengths, ranks = (7, 7, 1, 9), 2
    states = [torch.randn(1, n, sum(lengths), 8, dtype=torch.float64) for n in (4, 2, 2)]
    borders = {"segment_lengths": lengths, "segment_ends": ends_of(lengths, CPU), "sliding_window": window}
    alone, _ = segment_attention(Layer(2), *states, None, segment_lengths=lengths, sliding_window=window)

    def part(division: Any) -> Tensor:
        own = (x.chunk(ranks, 2)[division.place] for x in states)
        return segment_attention(Layer(2), *own, None, exchange=division.exchange, **borders)[0]

    torch.testing.assert_close(torch.cat(Threads(ranks).run(part), 1), alone, rtol=0, atol=1e-12)
    assert formula.calls == ranks


GROUPED_HEADS, ALL_HEADS = LlamaConfig(**GROUPED), GPT2Config(n_embd=32, n_head=4)


@pytest.mark.parametrize("config", [GROUPED_HEADS, ALL_HEADS], ids=["llama", "gpt2"])
def test_the_proof_finds_no_fault_in_a_right_kernel(config: PreTrainedConfig, formula: Formula) -> None:
    assert kernel_fault(config, CPU, torch.bfloat16) is None
    assert formula.calls == 4, "causal or not, with a window or without"


@pytest.mark.parametrize(("spoilt", "said"), [
    ("borders", "results differ"), ("window", "results differ"), ("gradient", "gradients of keys differ")])
def test_the_proof_finds_a_kernel_that_is_wrong(spoilt: str, said: str, formula: Formula) -> None:
    formula.spoilt = spoilt
    fault = kernel_fault(GROUPED_HEADS, CPU, torch.bfloat16)
    assert fault is not None and said in fault


def test_the_proof_says_what_a_device_without_the_kernel_says() -> None:
    fault = kernel_fault(GROUPED_HEADS, CPU, torch.bfloat16)
    assert fault is not None and "_flash_attention_forward" in fault
    assert kernel_fault(GROUPED_HEADS, CPU, torch.float32) == "the kernel does not take float32"
    assert kernel_fault(MambaConfig(), CPU, torch.bfloat16) == "its layers have no common number of attention heads"


def test_float32_wide_heads_dropout_and_filled_rows_are_left_to_others() -> None:
    half = torch.zeros(1, 2, 6, 8, dtype=torch.bfloat16)
    assert takes(half, half, half, 6, dropout=0.0)
    assert not takes(half, half, half, 5, dropout=0.0)
    assert not takes(half, half, half, 6, dropout=0.1)
    assert not takes(half, half, half[..., :4], 6, dropout=0.0)
    assert not takes(*[half.new_zeros(1, 2, 6, 512)] * 3, 6, dropout=0.0)
    assert not takes(half.float(), half, half, 6, dropout=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert takes(half.float(), half, half, 6, dropout=0.0)


def test_under_autocast_products_are_of_its_type(formula: Formula) -> None:
    states = [torch.randn(1, 2, 6, 8) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = attend(*states, ends_of((4, 2), CPU), 4, scale=None, causal=True, window=None)
    assert output.dtype == torch.bfloat16 and output.shape == (1, 6, 2, 8)


def flash_by_the_formula(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float | None = None,
    sliding_window: int | None = None, is_causal: bool | None = None, cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0, **_: Any,
) -> tuple[Tensor, None]:
    """With the arguments that transformers gives FlashAttention; padded rows one after another, by their mask."""
    causal = module.is_causal if is_causal is None else is_causal
    if cu_seq_lens_q is not None:
        return attend(query, key, value, cu_seq_lens_q, max_length_q, scale=scaling, causal=causal,
                      window=sliding_window), None
    kept = [query.shape[2]] * len(query) if mask is None else mask.sum(1).tolist()
    rows = query.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[3])
    for number, length in enumerate(kept):
        own = (x[number : number + 1, :, :length] for x in (query, key, value))
        rows[number, :length] = attend(*own, ends_of((length,), CPU), length, scale=scaling, causal=causal,
                                       window=sliding_window)[0]
    return rows, None


@pytest.mark.parametrize(("family", "task"), CASES)
def test_attention_of_transformers_that_takes_cumulative_lengths_gets_them(
    family: str, task: str, formula: Formula
) -> None:
    AttentionInterface.register(FLASH, flash_by_the_formula)
    AttentionMaskInterface.register(FLASH, flash_attention_mask)
    model = a_model(family, task).double()
    padded = loss_and_gradients(model, task, PADDED)
    model.config._attn_implementation = FLASH
    pooled = task == "sequence_classification"
    assert use_packing(model, pooled=pooled, first_position=0) == "varlen"
    if task != "preference":
        compared(loss_and_gradients(model, task, Layout("varlen")), padded)
        assert formula.calls == FAMILIES[family]().num_hidden_layers


def test_all_names_of_flash_attention_are_known() -> None:
    names = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "kernels-community/flash-attn2")
    assert all(takes_cumulative_lengths(name) for name in names)
    assert not any(takes_cumulative_lengths(name) for name in ("sdpa", "eager", "flex_attention", "sdpa_segments"))
