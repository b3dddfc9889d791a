"""Attention of many sequences at a time on CPUs, in bfloat16: that of each by itself."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from peftune.model import cpu_attention
from peftune.model.cpu_attention import FILLED, ROUND, SCORES, SHORT, attend, attends, groups_of

SIZE = 32
LENGTHS = ([5], [64, 60, 9, 1], [3, 50, 1, 50, 7, 7], [128, 127, 40] + [6] * 20, [8, 8, 16], [300, 290, 12, 257])


def one_by_one(query, key, value, lengths, *, causal):
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)))
    return torch.cat([scaled_dot_product_attention(*qkv, is_causal=causal, enable_gqa=True).transpose(1, 2)
                      for qkv in parts], dim=1)


def together(query, key, value, lengths, *, causal):
    return attend(query, key, value, lengths, scale=SIZE**-0.5, causal=causal)


def rows(lengths, heads, key_heads):
    """Query, key and value as a layer gives them, and a slope of the output."""
    torch.manual_seed(0)
    shapes = [(1, sum(lengths), n, SIZE) for n in (heads, key_heads, key_heads, heads)]
    query, key, value, slope = (torch.randn(shape).bfloat16() for shape in shapes)
    return [x.transpose(1, 2) for x in (query, key, value)], slope


def step(function, tensors, slope, lengths, *, causal):
    """The output, and the gradients of query, key and value."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    output = function(*tensors, lengths, causal=causal)
    return [output.detach(), *torch.autograd.grad(output, tensors, slope.to(output.dtype))]


def distances(found, exact):
    return [((x.double() - y).norm() / y.norm().clamp_min(1e-9)).item() for x, y in zip(found, exact, strict=True)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_outputs_and_gradients_are_as_near_to_the_exact_ones_as_torch_s_kernel_brings_them(lengths, key_heads, causal):
    tensors, slope = rows(lengths, 4, key_heads)
    exact = step(one_by_one, [x.double() for x in tensors], slope, lengths, causal=causal)
    found = step(together, tensors, slope, lengths, causal=causal)
    plain = distances(step(one_by_one, tensors, slope, lengths, causal=causal), exact)
    assert all(x.dtype == torch.bfloat16 and x.shape == y.shape for x, y in zip(found, exact, strict=True))
    assert max(distances(found, exact)) < max(4e-3, max(plain))


@pytest.mark.parametrize("causal", [True, False])
def test_no_sequence_sees_another(causal):
    lengths = LENGTHS[1]
    tensors, slope = rows(lengths, 4, 2)
    found = step(together, tensors, slope, lengths, causal=causal)
    others = [x.clone() for x in tensors]
    for x in others:
        x[:, :, :64] = torch.randn_like(x[:, :, :64])  # the first one, which stands in a group with the second
    slope = slope.clone()
    slope[:, :64] += 1
    changed = step(together, others, slope, lengths, causal=causal)
    assert torch.equal(found[0][:, 64:], changed[0][:, 64:]) and not torch.equal(found[0], changed[0])
    assert all(torch.equal(x[:, :, 64:], y[:, :, 64:]) for x, y in zip(found[1:], changed[1:], strict=True))


@pytest.mark.parametrize("lengths", [LENGTHS[1], LENGTHS[-1]], ids=str)
def test_tokens_behind_the_last_sequence_get_zeros_and_change_nothing(lengths):
    tensors, slope = rows(lengths, 4, 2)
    found = step(together, tensors, slope, lengths, causal=True)
    longer = [torch.cat([x, torch.full_like(x[:, :, :7], 9)], 2) for x in tensors]
    behind = step(together, longer, torch.cat([slope, torch.ones_like(slope)[:, :7]], 1), lengths, causal=True)
    tokens = sum(lengths)
    assert torch.equal(found[0], behind[0][:, :tokens]) and not behind[0][:, tokens:].any()
    for mine, other in zip(found[1:], behind[1:], strict=True):
        assert torch.equal(mine, other[:, :, :tokens]) and not other[:, :, tokens:].any()


def test_backward_of_short_sequences_alone_is_products_of_batches(monkeypatch):
    taken, plain = [], cpu_attention._slopes

    def noting(*args):
        taken.append(args[4].length)
        return plain(*args)

    monkeypatch.setattr(cpu_attention, "_slopes", noting)
    tensors, slope = rows(LENGTHS[-1], 4, 2)
    step(together, tensors, slope, LENGTHS[-1], causal=True)
    assert taken == [16]


def test_autocast_around_it_changes_nothing():
    lengths = LENGTHS[2]
    tensors, slope = rows(lengths, 2, 2)
    found = step(together, tensors, slope, lengths, causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = step(together, tensors, slope, lengths, causal=True)
    assert all(torch.equal(x, y) for x, y in zip(found, under, strict=True))


@pytest.mark.parametrize("lengths", [*LENGTHS, list(range(1, 200)), [512, 511, 2] * 3], ids=len)
def test_groups_hold_each_token_once_and_are_no_larger_than_is_said(lengths):
    groups = groups_of(tuple(lengths), 12)
    tokens = [token for group in groups for token in group.rows_NL.ravel()[group.real]]
    assert sorted(tokens) == list(range(sum(lengths)))
    assert tokens == [token for group in groups for token in group.tokens]
    for group in groups:
        longest = group.lengths_N.max()
        assert group.length == (longest if longest > SHORT else longest + -longest % ROUND)
        assert longest <= FILLED * group.lengths_N.min()
        assert len(group.lengths_N) == 1 or len(group.lengths_N) * 12 * longest**2 <= SCORES
        assert group.span is None or group.rows_NL.ravel().tolist() == list(range(group.span.start, group.span.stop))


def test_other_types_dropout_windows_and_values_of_another_size_take_torch_s_own_way():
    query = torch.zeros(1, 4, 8, SIZE, dtype=torch.bfloat16)
    assert attends(query, query, query, 8, dropout=0.0, window=None)
    assert attends(query, query, query, 8, dropout=0.0, window=8)
    assert not attends(query, query, query, 8, dropout=0.0, window=7)
    assert not attends(query, query, query, 8, dropout=0.1, window=None)
    assert not attends(query.float(), query, query, 8, dropout=0.0, window=None)
    assert not attends(query, query, query[..., 1:], 8, dropout=0.0, window=None)
