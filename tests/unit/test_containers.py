"""What containers leave a process: limits as Linux tells them of control groups."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftune.containers import cores, left_by_containers


@pytest.fixture
def contained(tmp_path):
    """Write groups' files, of version 1 or 2; return where the groups and a process's own are told."""
    def write(own: str, *groups: tuple[str, dict[str, object]]) -> tuple[Path, Path]:
        for folder, files in groups:
            (place := tmp_path / "groups" / folder).mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (place / name).write_text(f"{text}\n")
        (tmp_path / "own").write_text(own)
        return tmp_path / "groups", tmp_path / "own"

    return write


def version_2(most: object, used: int, given_up: int) -> dict[str, object]:
    return {"memory.max": most, "memory.current": used, "memory.stat": f"anon 5\ninactive_file {given_up}"}


def version_1(most: int, used: int, given_up: int) -> dict[str, object]:
    return {"memory.limit_in_bytes": most, "memory.usage_in_bytes": used,
            "memory.stat": f"inactive_file 1\ntotal_inactive_file {given_up}"}


@pytest.mark.parametrize("path", ["/docker/3f", "/"])
def test_a_container_of_version_2_leaves_its_limit_less_what_is_used_and_not_given_up(path, contained):
    assert left_by_containers(*contained(f"0::{path}\n", (path.strip("/"), version_2(1000, 700, 200)))) == 500


def test_a_container_whose_path_is_its_hosts_is_found_where_its_own_group_is_mounted(contained):
    assert left_by_containers(*contained("0::/kubepods/pod1/c1\n", ("", version_2(1000, 700, 0)))) == 300


def test_the_tightest_of_several_groups_counts(contained):
    groups = ("job", version_2(1000, 800, 0)), ("job/step", version_2("max", 10, 0)), ("job/step/task", {})
    assert left_by_containers(*contained("0::/job/step/task\n", *groups)) == 200


def test_a_container_of_version_1_counts_too(contained):
    groups = ("memory/docker/3f", version_1(1000, 400, 100)), ("memory", version_1(2**63 - 4096, 5000, 0))
    assert left_by_containers(*contained("4:cpu,cpuacct:/\n3:memory:/docker/3f\n0::/\n", *groups)) == 700


def test_no_group_with_a_limit_limits_nothing(contained):
    assert left_by_containers(*contained("0::/user.slice\n", ("user.slice", version_2("max", 5, 0)))) is None


def test_memory_beyond_a_limit_is_no_memory(contained):
    assert left_by_containers(*contained("0::/\n", ("", version_2(1000, 1100, 50)))) == 0


MAY = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


@pytest.mark.parametrize(("told", "expected"), [
    ("max 100000", MAY), ("100000 100000", 1), ("190000 100000", 1), ("50000 100000", 1), (f"{MAY}00000 100000", MAY),
    (f"{MAY + 60}00000 100000", MAY)])
def test_cores_are_the_whole_ones_in_the_time_that_a_group_is_given(told, expected, contained):
    groups = ("pod", {"cpu.max": told}), ("pod/c1", {"cpu.max": "max 100000"})
    assert cores(*contained("0::/pod/c1\n", *groups)) == expected


@pytest.mark.parametrize(("quota", "expected"), [(-1, MAY), (150_000, 1)])
def test_cores_of_version_1_are_told_in_two_files(quota, expected, contained):
    told = {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": 100_000}
    assert cores(*contained("4:cpu,cpuacct:/docker/3f\n3:memory:/x\n0::/\n", ("cpu/docker/3f", told))) == expected


@pytest.mark.parametrize(("given", "expected"), [({}, "1"), ({"OMP_NUM_THREADS": "2"}, "2"),
                                                 ({"LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}, "1")])
def test_a_process_computes_with_no_more_threads_than_its_share_of_time_feeds(given, expected):
    code = ("import torch; from peftune.parallel import world; world.cores = lambda: 1; world._share_cores(1); "
            "print(torch.get_num_threads())")
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "LOCAL_RANK")}
    done = subprocess.run([sys.executable, "-c", code], env={**clean, **given}, check=True, capture_output=True,
                          text=True)
    assert done.stdout.strip() == expected
