"""Attention of short sequences in bfloat16: the same output, gradients nearer to the exact ones."""

from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from peftune.model.short_attention import SHORT, attend_short


def attend(query, key, value, *, causal):
    return scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True).transpose(1, 2)


def step(function, tensors, slope):
    """Its output, and the gradients of query, key and value."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    output = function(*tensors)
    return output, torch.autograd.grad(output, tensors, slope.to(output.dtype))


def distance(found, exact):
    return max(((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("sequences", "length", "key_heads"), [(7, 5, 4), (2, 64, 2), (1, SHORT, 4)])
def test_the_output_is_the_same_bit_for_bit_and_the_gradients_are_nearer_to_exact_ones(
        causal, sequences, length, key_heads):
    torch.manual_seed(0)
    heads = (4, key_heads, key_heads)
    tensors = [torch.randn(sequences, n, length, 32).bfloat16() for n in heads]
    slope = torch.randn(sequences, length, 4, 32).bfloat16()
    own = partial(attend, causal=causal)
    plain, plain_gradients = step(own, tensors, slope)
    output, gradients = step(partial(attend_short, own), tensors, slope)
    _, exact = step(own, [x.double() for x in tensors], slope)
    assert output.grad_fn.name() == "_WideGradientsBackward" and torch.equal(output, plain)
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)
    assert distance(gradients, exact) <= distance(plain_gradients, exact)
    assert distance(gradients, exact) < 4e-3


@pytest.mark.parametrize(("length", "dtype"), [(SHORT + 1, torch.bfloat16), (8, torch.float32)])
def test_long_sequences_and_other_types_take_torch_s_own_way(length, dtype):
    tensors = [torch.randn(1, 2, length, 16, dtype=dtype, requires_grad=True) for _ in range(3)]
    output = attend_short(partial(attend, causal=True), *tensors)
    assert output.grad_fn.name() != "_WideGradientsBackward"


def test_gradients_are_the_same_where_autocast_is_on_around_backward():
    torch.manual_seed(0)
    tensors = [torch.randn(2, 2, 9, 16).bfloat16() for _ in range(3)]
    slope = torch.randn(2, 9, 2, 16).bfloat16()
    own = partial(attend_short, partial(attend, causal=True))
    _, gradients = step(own, tensors, slope)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, under = step(own, tensors, slope)
    assert all(torch.equal(x, y) for x, y in zip(gradients, under, strict=True))
