"""What a process holds of host memory beside its tensors."""

import os
import subprocess
import sys

import psutil
import pytest

from peftune.parallel.host_memory import (
    CAPACITIES,
    KEPT_PRODUCTS,
    MAPPING,
    PRELOAD,
    TCMALLOCS,
    preload,
    return_free_memory,
)
from peftune.parallel.launcher import choose_launch
from tests.conftest import ROOT

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has LD_PRELOAD and /proc")
MIB = 2**20
SHAPES = 300
PRODUCTS = f"""
import sys, torch
from peftune.parallel.host_memory import keep_few_products
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


def answer(code: str, *words: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in (PRELOAD, MAPPING, *CAPACITIES)}
    done = subprocess.run([sys.executable, "-c", code, *words], env={**clean, **environment}, cwd=ROOT, check=True,
                          capture_output=True, text=True)
    return done.stdout.strip()


@linux
def test_a_run_on_cpus_is_launched_with_tcmalloc_where_that_is_installed(monkeypatch):
    monkeypatch.delenv(PRELOAD, raising=False)
    monkeypatch.delenv(MAPPING, raising=False)
    variables = preload()
    if not variables:
        pytest.skip(f"none of {TCMALLOCS} is installed")
    assert f"{PRELOAD}={variables[PRELOAD]} accelerate launch" in str(choose_launch("single", 1, ["c.yaml"]))
    asked = "from peftune.parallel.host_memory import allocator; print(allocator())"
    assert [answer(asked), answer(asked, **variables), answer(asked, **{MAPPING: "131072"})] == [
        "glibc", "tcmalloc", "glibc, mapping"]


@pytest.mark.parametrize("name", [PRELOAD, MAPPING])
def test_an_allocator_that_somebody_chose_stays(name, monkeypatch):
    monkeypatch.delenv(PRELOAD, raising=False)
    monkeypatch.setenv(name, "chosen")
    assert preload() == {}


@linux
def test_memory_that_nothing_uses_goes_back_to_the_system():
    blocks = [bytearray(os.urandom(2**16)) for _ in range(3000)]
    last = bytearray(os.urandom(2**16))  # at the heap's end: what is before it does not go back by itself
    del blocks
    before = psutil.Process().memory_info().rss
    return_free_memory("cpu")
    assert before - psutil.Process().memory_info().rss > 100 * MIB and last


def test_few_products_are_kept():
    kept, made_anew = "create:cache_hit", "create:cache_miss"
    by_default, bounded = answer(PRODUCTS, "all"), answer(PRODUCTS, "few")
    if "create:" not in by_default:
        pytest.skip("oneDNN does not make this processor's products in bfloat16")
    assert by_default.count(made_anew) == bounded.count(kept) == 0
    assert by_default.count(kept) == bounded.count(made_anew) > KEPT_PRODUCTS
