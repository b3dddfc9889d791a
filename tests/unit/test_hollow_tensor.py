"""Tensors without values beside real ones: forms, bytes, views, changes in place, gradients."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.nn import functional as F

from peftune.model.hollow_tensor import HollowTensor, storage_of

OPERATORS = {
    "product": lambda x, y: x @ y.transpose(1, 2),
    "sum of two types": lambda x, y: x.to(torch.bfloat16) + y.double(),
    "broadcast": lambda x, y: x[:, :1] * y + 1,
    "number in front": lambda x, y: 2 - x,
    "mean": lambda x, y: x.mean(-1, keepdim=True),
    "one of a row": lambda x, y: x[:, -1],
    "view": lambda x, y: x.view(2, 12, 4).transpose(0, 1),
    "view that does not say so": lambda x, y: torch.ops.aten._unsafe_view(x, [12, 8]),
    "copy of a view": lambda x, y: x.transpose(1, 2).reshape(2, -1),
    "dense copy": lambda x, y: x.permute(2, 0, 1).contiguous(),
    "copy that keeps strides": lambda x, y: x.permute(2, 0, 1).clone(),
    "like": lambda x, y: torch.empty_like(x.transpose(0, 1), dtype=torch.int64),
    "parts": lambda x, y: x.split([1, 5], dim=1),
    "joined": lambda x, y: torch.cat([x, y.bfloat16()], dim=2),
    "largest": lambda x, y: x.topk(3, dim=-1),
    "norm": lambda x, y: F.layer_norm(x, (8,)),
    "norm of bfloat16": lambda x, y: torch.native_layer_norm(x.bfloat16(), (8,), y[0, 0].bfloat16(), None, 1e-5),
    "attention": lambda x, y: F.scaled_dot_product_attention(*(x[:, None].expand(2, 4, 6, 8),) * 3, is_causal=True),
    "attention with a mask": lambda x, y: F.scaled_dot_product_attention(
        *(y[:, None],) * 3, attn_mask=torch.ones(6, 6, dtype=torch.bool)),
    "rows by number": lambda x, y: x[torch.tensor([1, 0, 1])],
    "embedding": lambda x, y: F.embedding(torch.ones(3, 5, dtype=torch.int64), x[0]),
    "loss": lambda x, y: F.cross_entropy(x[0], torch.zeros(6, dtype=torch.int64), reduction="none"),
    "many at once": lambda x, y: torch._foreach_mul([x, y], 0.5),
    "dropped": lambda x, y: F.dropout(x, 0.5),
    "triangle": lambda x, y: x.tril(),
    "grouped kernel": lambda x, y: F.conv1d(x, torch.ones(6, 1, 3), groups=6),
    "products with many experts": lambda x, y: torch._grouped_mm(
        x.flatten(0, 1), torch.cat([y, y], 1).transpose(1, 2), offs=torch.tensor([5, 12], dtype=torch.int32)),
    "changed": lambda x, y: x.mul_(y).add_(1),
    "changed, an axis more": lambda x, y: x.unsqueeze_(0),
    "changed, axes swapped": lambda x, y: x.transpose_(0, 2).clone(),
    "part of it changed": lambda x, y: x[:, :2].copy_(y[:, 2:4]),
    "filled": lambda x, y: x.masked_fill_(torch.ones(6, 8, dtype=torch.bool), 0.0),
    "many changed": lambda x, y: torch._foreach_add_([x, y], [y, x]),
}


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """[2, 6, 8] float32."""
    return torch.ones(2, 6, 8), torch.ones(2, 6, 8)


def forms(result) -> list:
    """Shape, strides, type, first place, bytes."""
    tensors = [result] if isinstance(result, torch.Tensor) else list(result or ())
    return [(x.shape, x.stride(), x.dtype, x.device, x.storage_offset(), storage_of(x).nbytes()) for x in tensors]


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_gives_what_it_gives_of_real_tensors(name):
    operator = OPERATORS[name]
    real = pair()
    expected = operator(*real)
    for _ in range(2):  # asked, then remembered
        hollow = [HollowTensor(x.to("meta")) for x in pair()]
        found = operator(*hollow)
        assert forms(found) == forms(expected)
        assert forms(hollow) == forms(real)
        tensors = [found] if isinstance(found, torch.Tensor) else list(found or ())
        assert all(isinstance(x, HollowTensor) for x in tensors)
        for mine, theirs in zip(tensors, [expected] if isinstance(expected, torch.Tensor) else expected or ()):
            assert [storage_of(mine)._cdata == storage_of(x)._cdata for x in hollow] == [
                theirs.untyped_storage()._cdata == x.untyped_storage()._cdata for x in real]
            assert [mine is x for x in hollow] == [theirs is x for x in real]


def test_what_is_remembered_of_an_operator_tells_numbers_of_one_value_by_their_type():
    x = HollowTensor(torch.ones(3, dtype=torch.int64, device="meta"))
    assert [(x * factor).dtype for factor in (1, 1.0, True, 1)] == [
        torch.int64, torch.float32, torch.int64, torch.int64]
    assert [(x + HollowTensor(torch.ones(2, 3, dtype=kind, device="meta"))).dtype
            for kind in (torch.int32, torch.float64)] == [torch.int64, torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_forms_of_real_ones(dtype):
    def gradients(kind) -> list:
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4, bias=False))
        for module in model:
            module._parameters.update({
                name: nn.Parameter(kind(value.detach())) for name, value in module.named_parameters()})
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model(kind(torch.ones(2, 3, 8)))
        assert output.dtype == dtype
        output.float().sum().backward()
        return forms(parameter.grad for parameter in model.parameters())

    assert gradients(lambda x: HollowTensor(x.to("meta"))) == gradients(lambda x: x)


def test_what_depends_on_values_is_refused_and_numbers_read_from_it_are_ones():
    x = HollowTensor(torch.ones(2, 2, device="meta"))
    with pytest.raises(DynamicOutputShapeException):
        x.nonzero()
    assert (x.sum().item(), x.tolist()) == (1.0, [[1.0, 1.0], [1.0, 1.0]])


def test_a_parameter_takes_other_data_as_a_real_one_does():
    def parameter(kind):
        held = nn.Parameter(kind(torch.ones(8)))
        held.data = held.data.to(torch.bfloat16)
        return held, (kind(torch.ones(2, 8)).bfloat16() * held).sum()

    hollow, total = parameter(lambda x: HollowTensor(x.to("meta")))
    real, _ = parameter(lambda x: x)
    assert (forms(hollow), forms(hollow.data)) == (forms(real), forms(real.data))
    total.backward()
    assert hollow.grad is not None
    assert forms(hollow.grad)[0][:4] == forms(real)[0][:4]
