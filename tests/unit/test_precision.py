"""In which type products are computed, and what is said about it."""

from __future__ import annotations

import platform

import pytest
import torch

from peftune.config.schema import ModelConfig
from peftune.model.precision import slow_products

NATIVE = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
X86 = platform.machine() in ("x86_64", "AMD64")


def said(dtype: str, device: str) -> str | None:
    return slow_products(ModelConfig(name_or_path="any", dtype=dtype), torch.device(device))


def test_float32_and_gpus_are_never_called_slow() -> None:
    assert said("float32", "cpu") is None
    assert said("bfloat16", "cuda") is None


@pytest.mark.skipif(NATIVE or not X86, reason="this CPU may have bfloat16 instructions")
def test_a_cpu_that_emulates_bfloat16_is_named_with_the_mend() -> None:
    told = said("bfloat16", "cpu")
    assert told is not None and torch.backends.cpu.get_cpu_capability() in told and "model.dtype=float32" in told
