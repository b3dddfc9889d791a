"""How products are computed on a CPU without instructions for bfloat16."""

import pytest
import torch

import peftune.model.precision as precision
from peftune.config.schema import ModelConfig
from peftune.plan.devices import cpu_rate


@pytest.mark.parametrize("lacks, dtype, device, widened", [
    (True, "bfloat16", "cpu", True), (True, "float32", "cpu", False), (True, "bfloat16", "cuda", False),
    (False, "bfloat16", "cpu", False)])
@pytest.mark.parametrize("pure", [True, False])
def test_only_bfloat16_on_such_a_cpu_is_multiplied_in_float32(lacks, dtype, device, widened, pure, monkeypatch):
    asked = []
    monkeypatch.setattr(precision, "lacks_bfloat16", lambda: lacks)
    monkeypatch.setattr(precision, "multiply_in_float32", lambda: asked.append(True))
    precision.autocast(ModelConfig(name_or_path="any", dtype=dtype, pure_bf16=pure), torch.device(device))
    assert bool(asked) == widened


@pytest.mark.parametrize("dtype, widened", [("bfloat16", True), ("float32", False)])
def test_a_plan_times_the_products_that_a_run_takes(dtype, widened, monkeypatch):
    asked = []
    monkeypatch.setattr(precision, "lacks_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "multiply_in_float32", lambda: asked.append(True))
    cpu_rate(dtype)
    assert bool(asked) == widened
