"""What a process holds of host memory beside its tensors."""

import os
import subprocess
import sys

import psutil
import pytest

from peftune.parallel.containers import left_by_containers
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


@pytest.fixture
def contained(tmp_path):
    """Write a group's files, of version 1 or 2; return the least that groups leave."""
    def write(own: str, *groups: tuple[str, dict[str, object]]) -> int | None:
        for folder, files in groups:
            (place := tmp_path / "groups" / folder).mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (place / name).write_text(f"{text}\n")
        (tmp_path / "own").write_text(own)
        return left_by_containers(tmp_path / "groups", tmp_path / "own")

    return write


def version_2(most: object, used: int, given_up: int) -> dict[str, object]:
    return {"memory.max": most, "memory.current": used, "memory.stat": f"anon 5\ninactive_file {given_up}"}


def version_1(most: int, used: int, given_up: int) -> dict[str, object]:
    return {"memory.limit_in_bytes": most, "memory.usage_in_bytes": used,
            "memory.stat": f"inactive_file 1\ntotal_inactive_file {given_up}"}


@pytest.mark.parametrize("path", ["/docker/3f", "/"])
def test_a_container_of_version_2_leaves_its_limit_less_what_is_used_and_not_given_up(path, contained):
    assert contained(f"0::{path}\n", (path.strip("/"), version_2(1000, 700, 200))) == 500


def test_a_container_whose_path_is_its_hosts_is_found_where_its_own_group_is_mounted(contained):
    assert contained("0::/kubepods/pod1/c1\n", ("", version_2(1000, 700, 0))) == 300


def test_the_tightest_of_several_groups_counts(contained):
    groups = ("job", version_2(1000, 800, 0)), ("job/step", version_2("max", 10, 0)), ("job/step/task", {})
    assert contained("0::/job/step/task\n", *groups) == 200


def test_a_container_of_version_1_counts_too(contained):
    groups = ("memory/docker/3f", version_1(1000, 400, 100)), ("memory", version_1(2**63 - 4096, 5000, 0))
    assert contained("4:cpu,cpuacct:/\n3:memory:/docker/3f\n0::/\n", *groups) == 700


def test_no_group_with_a_limit_limits_nothing(contained):
    assert contained("0::/user.slice\n", ("user.slice", version_2("max", 5, 0))) is None


def test_memory_beyond_a_limit_is_no_memory(contained):
    assert contained("0::/\n", ("", version_2(1000, 1100, 50))) == 0


def test_a_process_may_take_what_its_limit_leaves_beside_what_it_holds(monkeypatch):
    monkeypatch.delenv(LIMIT, raising=False)
    without = free_bytes(1)
    held = psutil.Process().memory_info().rss
    monkeypatch.setenv(LIMIT, str(held + 300 * MIB))
    assert free_bytes(1) == pytest.approx(300 * MIB, abs=30 * MIB) and without > 300 * MIB
    assert free_bytes(2) == pytest.approx(300 * MIB, abs=30 * MIB)
