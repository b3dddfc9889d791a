"""Products of bfloat16 that are computed in float32: the exact ones, rounded once."""

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from peftune.numerics import products

ULP = 2.0**-8
"""Of bfloat16: half a step relative to the number, with room for the order of float32 sums."""


@pytest.fixture
def parts(monkeypatch):
    """Products are taken over until the test ends; counts the parts they were computed in."""
    counted = []
    monkeypatch.setattr(products, "TILE", 96)

    def counting(plain):
        def parts_of(a, b):
            for part in plain(a, b):
                counted.append(True)
                yield part

        return parts_of

    for name in ("_tiles", "_batches"):
        monkeypatch.setattr(products, name, counting(getattr(products, name)))
    products.multiply_in_float32.cache_clear()
    library = products.multiply_in_float32()
    yield counted
    library._destroy()
    products.multiply_in_float32.cache_clear()


def drawn(*shape):
    return torch.randn(*shape).bfloat16()


def is_rounded_once(found, exact):
    """`exact`: in float64."""
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    return bool(((found.double() - exact).abs() <= ULP * exact.abs() + 1e-5).all())


@pytest.mark.parametrize("m, k, n", [(1, 7, 5), (4, 16, 40), (5, 16, 40), (40, 16, 5), (33, 100, 31), (6, 0, 3),
                                     (0, 5, 3)])
@pytest.mark.parametrize("turned", ["neither", "left", "right", "both"])
def test_a_product_of_any_shape_and_order_in_memory_is_exact_but_for_its_last_rounding(m, k, n, turned, parts):
    torch.manual_seed(0)
    a = drawn(k, m).t() if turned in ("left", "both") else drawn(m, k)
    b = drawn(n, k).t() if turned in ("right", "both") else drawn(k, n)
    exact = a.double() @ b.double()
    assert is_rounded_once(a @ b, exact)
    assert is_rounded_once(torch.mm(a, b, out=torch.empty(m, n, dtype=torch.bfloat16)), exact)
    assert is_rounded_once(torch.mm(a, b, out=torch.empty(0, dtype=torch.bfloat16)), exact)


def test_batches_of_products_are_taken_too(parts):
    torch.manual_seed(0)
    a, b = drawn(5, 9, 6), drawn(5, 7, 6).transpose(1, 2)
    assert is_rounded_once(a @ b, a.double() @ b.double())
    assert len(parts) == 5, "one matrix fills a tile"
    assert (drawn(0, 3, 4) @ drawn(0, 4, 2)).shape == (0, 3, 2)


@pytest.mark.parametrize("added", [(31,), (33, 31), (33, 1)], ids=str)
@pytest.mark.parametrize("beta, alpha", [(1, 1), (0.5, 2), (0, 1)])
def test_a_sum_with_a_product_is_rounded_once(added, beta, alpha, parts):
    torch.manual_seed(0)
    added, a, b = drawn(*added), drawn(33, 20), drawn(20, 31)
    exact = beta * added.double() + alpha * (a.double() @ b.double())
    assert is_rounded_once(torch.addmm(added, a, b, beta=beta, alpha=alpha), exact)
    into = torch.empty(33, 31, dtype=torch.bfloat16)
    assert is_rounded_once(torch.addmm(added, a, b, beta=beta, alpha=alpha, out=into), exact)
    if added.shape == (33, 31):
        assert is_rounded_once(added.clone().addmm_(a, b, beta=beta, alpha=alpha), exact)
        batch = torch.baddbmm(added[None], a[None], b[None], beta=beta, alpha=alpha)
        assert is_rounded_once(batch, exact[None])


def test_what_is_added_is_not_read_where_it_does_not_count(parts):
    nothing = torch.full((8, 8), float("nan")).bfloat16()
    assert torch.addmm(nothing, drawn(8, 8), drawn(8, 8), beta=0).isfinite().all()


def test_layers_under_autocast_and_their_gradients_come_here(parts):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 9, 16), (24, 16), (24,)))
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(x, weight, bias)
    forward = len(parts)
    slope = drawn(2, 9, 24)
    found.backward(slope)
    assert 0 < forward < len(parts)
    exact_weight = slope.double().flatten(0, 1).t() @ x.detach().bfloat16().double().flatten(0, 1)
    assert is_rounded_once(weight.grad.bfloat16(), exact_weight)
    assert is_rounded_once(x.grad.bfloat16(), slope.double() @ weight.detach().bfloat16().double())


def test_other_types_keep_torch_s_kernels(parts):
    a, b = torch.randn(9, 9), torch.randn(9, 9)
    assert torch.equal(a @ b, torch.addmm(torch.zeros(9, 9), a, b))
    assert (a.double() @ b.double()).dtype == torch.float64 and not parts
    with pytest.raises(RuntimeError, match="same dtype"):
        torch.mm(a, b.bfloat16())
    with pytest.raises(RuntimeError):
        torch.mm(a.bfloat16(), b)


@pytest.mark.parametrize("masked", [True, False])
def test_gradients_of_attention_are_as_near_to_the_exact_ones_as_torch_s_kernel_brings_them(masked, request):
    torch.manual_seed(0)
    tensors, slope = [drawn(2, 3, 40, 16) for _ in range(3)], drawn(2, 3, 40, 16)
    mask = drawn(1, 1, 40, 40) if masked else None

    def gradients(dtype):
        given = [x.to(dtype).detach().requires_grad_() for x in tensors]
        out = scaled_dot_product_attention(*given, attn_mask=None if mask is None else mask.to(dtype),
                                           is_causal=not masked)
        return torch.autograd.grad(out, given, slope.to(dtype))

    exact, plain = gradients(torch.float64), gradients(torch.bfloat16)
    request.getfixturevalue("parts")
    found = gradients(torch.bfloat16)
    for ours, theirs, right in zip(found, plain, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - right).norm() <= max((theirs.double() - right).norm(), 4e-3 * right.norm())
