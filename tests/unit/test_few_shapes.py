"""Few shapes of products: sizes of rows, and the code that is kept."""

import os
import subprocess
import sys

import pytest
import torch

from peftune.data.examples import Example
from peftune.data.layouts import Layout, lay_out
from peftune.numerics import linear_loss
from peftune.numerics.few_shapes import CAPACITIES, KEPT_SLOW_PRODUCTS, SIZES, filled_up, makes_code_slowly
from peftune.numerics.linear_loss import head_cross_entropy
from peftune.numerics.losses import IGNORE
from tests.conftest import ROOT

SHAPES = 300
PRODUCTS = f"""
import sys, torch
from peftune.numerics.few_shapes import keep_few_products
if sys.argv[1] == "few":
    keep_few_products()
rows, weight = torch.randn({SHAPES}, 64, dtype=torch.bfloat16), torch.randn(64, 64, dtype=torch.bfloat16)
def each_shape():
    for count in range(2, {SHAPES}):
        torch.mm(rows[:count], weight)
each_shape()
with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
    each_shape()
"""


def products(which: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in CAPACITIES}
    done = subprocess.run([sys.executable, "-c", PRODUCTS, which], env=clean, cwd=ROOT, check=True,
                          capture_output=True, text=True)
    return done.stdout


@pytest.mark.slow
def test_few_products_are_kept():
    kept, made_anew = "create:cache_hit", "create:cache_miss"
    by_default, bounded = products("all"), products("few")
    if "create:" not in by_default:
        pytest.skip("oneDNN does not make this processor's products in bfloat16")
    assert by_default.count(made_anew) == bounded.count(kept) == 0
    assert by_default.count(kept) == bounded.count(made_anew) > KEPT_SLOW_PRODUCTS


def test_sizes_are_few_and_near_what_was_asked_for():
    assert [filled_up(tokens) for tokens in (1, 32, 33, 500, 1024, 1025, 1100, 2048, 2049, 4000)] == [
        32, 32, 64, 512, 1024, 1088, 1152, 2048, 2176, 4096]
    for tokens in range(512, 8192, 7):
        assert tokens <= filled_up(tokens) < tokens * (1 + 1 / SIZES) + 1
    assert len({filled_up(tokens) for tokens in range(2049, 4097)}) == SIZES


def test_only_products_in_bfloat16_have_slow_code():
    assert not makes_code_slowly(torch.float32)
    assert makes_code_slowly(torch.bfloat16) == bool(torch.cpu.get_capabilities().get("amx_tile"))


def test_a_row_is_filled_up_behind_its_sequences_with_what_no_loss_sees():
    examples = [Example(ids, ids, len(ids) - 1, len(ids), {}) for ids in ([5, 6, 7], [8] * 40)]
    plain, filled = (lay_out(examples, (0, 1), layout=Layout("segments", 2, few_sizes=few), pad_id=0, kind="token",
                             width=0, device=torch.device("cpu")) for few in (False, True))
    assert filled.inputs["input_ids"].shape == filled.inputs["position_ids"].shape == (1, 64)
    assert filled.inputs["segment_lengths"] == filled.lengths == plain.lengths == (3, 40)
    assert filled.tokens == plain.tokens == 43
    for name in ("input_ids", "position_ids"):
        assert torch.equal(filled.inputs[name][:, :43], plain.inputs[name])
    assert set(filled.inputs["position_ids"][0, 43:].tolist()) == {2}
    assert torch.equal(filled.targets[:, :43], plain.targets) and set(filled.targets[0, 43:].tolist()) == {IGNORE}


@pytest.mark.parametrize("trained", [False, True])
def test_losses_and_gradients_of_an_output_layer_on_filled_up_rows_are_those_of_the_rows(trained, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((37, 8), (50, 8)))
    ids, slope = torch.randint(50, (37,), generator=generator), torch.randn(37, generator=generator)
    weight.requires_grad_(trained)
    asked = [hidden.requires_grad_(), *([weight] if trained else [])]
    seen = []

    def head(rows):
        seen.append(len(rows))
        return rows @ weight.t()

    def step():
        nats = head_cross_entropy(head, hidden, ids, rows=48)
        return [nats, *torch.autograd.grad(nats, asked, slope)]

    plain = step()
    assert 37 in seen
    seen.clear()
    monkeypatch.setattr(linear_loss, "makes_code_slowly", lambda dtype: dtype == torch.float64)
    filled = step()
    assert {*seen} <= {0, 16, 48} and seen
    for mine, other in zip(filled, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
