"""What a process holds of host memory beside its tensors."""

import os
import subprocess
import sys

import psutil
import pytest

from peftune.parallel.host_memory import (
    LIMIT,
    MAPPING,
    PRELOAD,
    TCMALLOCS,
    free_bytes,
    preload,
    return_free_memory,
)
from peftune.parallel.launcher import choose_launch
from tests.conftest import ROOT

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has LD_PRELOAD and /proc")
MIB = 2**20


def answer(code: str, *words: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in (PRELOAD, MAPPING)}
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


def test_a_process_may_take_what_its_limit_leaves_beside_what_it_holds(monkeypatch):
    monkeypatch.delenv(LIMIT, raising=False)
    without = free_bytes(1)
    held = psutil.Process().memory_info().rss
    monkeypatch.setenv(LIMIT, str(held + 300 * MIB))
    assert free_bytes(1) == pytest.approx(300 * MIB, abs=30 * MIB) and without > 300 * MIB
    assert free_bytes(2) == pytest.approx(300 * MIB, abs=30 * MIB)
