"""A rank that dies, hangs or is slow: the others end in bounded time, by name, or wait."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from peftune.errors import EXIT_CODE_FILE
from peftune.parallel import world
from peftune.parallel.launcher import choose_launch
from peftune.parallel.posts import Post, standstill
from peftune.parallel.stop import Stop
from peftune.parallel.watch import watched_world
from peftune.parallel.world import World
from tests.conftest import summary, training_processes, write_config
from tests.faults.test_preemption import Started, reached

LIMIT_S = 4
PLANTED = Path(__file__).with_name("planted_train.py")


def post(**said) -> Post:
    return Post(**{"number": 9, "host": "node1", "machine": "m", "pid": 77, "born": "1", "doing": "in step 5",
                   "marks": 3, "still_s": 0.0, "waiting": False, "place": "", "left": False, **said})


def judged(*posts: Post, unheard_s=(0.0, 0.0, 0.0)):
    return standstill(dict(enumerate(posts)), dict(enumerate(unheard_s)), 600)


def test_ranks_that_wait_for_one_that_works_may_wait_for_ever():
    assert judged(post(still_s=9e5, waiting=True), post(still_s=1, doing="preparing the data")) is None


def test_where_nobody_comes_further_the_one_that_waits_for_nobody_is_named():
    verdict = judged(post(still_s=700, waiting=True), post(still_s=690, host="node2", place="data/layouts.py:9"))
    assert verdict.ranks == (1,) and verdict.code == 1
    assert verdict.message == ("rank 1 on node2 (process 77), in step 5, has stood still for 690 s, at "
                               "data/layouts.py:9; the others wait for it")


def test_of_two_that_wait_for_nobody_the_one_with_less_behind_it_is_named():
    assert judged(post(still_s=700), post(still_s=700, marks=2), post(still_s=700, waiting=True)).ranks == (1,)


def test_nobody_is_blamed_where_all_wait_for_each_other():
    verdict = judged(post(still_s=700, waiting=True), post(still_s=700, waiting=True))
    assert verdict.ranks == () and "no rank is behind the others" in verdict.message


def test_a_rank_that_is_silent_is_named_though_the_others_stand_still_a_little_longer():
    posts = post(still_s=603, waiting=True), post(still_s=2)
    assert judged(*posts, unheard_s=(1, 599)) is None
    verdict = judged(*posts, unheard_s=(1, 601))
    assert verdict.ranks == (1,) and "has not been heard of for 601 s" in verdict.message


def test_ranks_that_have_ended_are_not_missed():
    assert judged(post(left=True), post(), unheard_s=(9e5, 0)) is None
    assert judged(post(left=True), post(left=True), unheard_s=(9e5, 9e5)) is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_fails_does_not_wait_for_the_others_to_end_the_group(monkeypatch, ranks):
    ended = []
    monkeypatch.setattr(world, "_open_world", lambda: World(0, ranks, 0, torch.device("cpu"), None))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append(True))
    with watched_world(None, Stop()):
        pass
    assert ended.pop()
    with pytest.raises(ZeroDivisionError), watched_world(None, Stop()):
        1 / 0  # noqa: B018
    assert bool(ended) == (ranks == 1)


@pytest.fixture
def started(tmp_path):
    """Launch a run on two processes; whatever is left of it in the end is killed."""
    running = []

    def start(config, strategy, *more, script=None, limit=f"{LIMIT_S}s", **variables) -> Started:
        launch = choose_launch(strategy, 2, [str(config), f"hang_timeout={limit}"])
        words = [str(script) if script and word.endswith("peftune/train.py") else word for word in launch.command]
        running.append(Started([sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *more, *words],
                               tmp_path, **{**launch.environment, "OMP_NUM_THREADS": "1", **variables}))
        return running[-1]

    yield start
    for run in running:
        if run.process.poll() is None:
            for process in psutil.Process(run.process.pid).children(recursive=True):
                process.kill()
            run.process.kill()


@pytest.fixture
def run_of(classify, tmp_path):
    """A config of so many steps with no checkpoint before its end, and its folder."""

    def make(steps: int):
        classify["train"]["max_steps"] = steps
        classify["checkpoint"] = classify["evaluation"] = {"every_steps": 10 * steps}
        return write_config(classify, tmp_path / "c"), Path(classify["output_dir"])

    return make


def named(output: str) -> str:
    found = [line for line in output.splitlines() if line.startswith("error: rank ")]
    assert len(found) == 1, output
    return found[0]


def strike(run: Started, folder: Path, rank: int, number: int) -> int:
    """Send a signal to a rank that is in a step; return its process id."""
    run.wait_until(reached(folder, 8), seconds=400)
    time.sleep(1)  # each has said that it is in a step
    process = training_processes(folder.parent)[rank]
    os.kill(process, number)
    return process


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run_by_name(run_of, started):
    config, folder = run_of(4000)
    run = started(config, "zero2")
    killed = strike(run, folder, 1, signal.SIGKILL)
    before = time.monotonic()
    output = run.ends_with(1)
    assert time.monotonic() - before < 30
    assert re.match(rf"error: rank 1 on \S+ \(process {killed}\), in step \d+, has died", named(output))
    assert "mend: start the same command again" in output


@pytest.mark.slow
def test_a_rank_that_is_stopped_ends_all_by_name_and_torchrun_starts_them_again(run_of, started):
    config, folder = run_of(150)
    run = started(config, "fsdp2", "--max_restarts", "1")
    stopped = strike(run, folder, 0, signal.SIGSTOP)
    output = run.ends_with(0, seconds=400)
    assert re.match(rf"error: rank 0 on \S+ \(process {stopped}\), in step \d+, has not been heard of", named(output))
    assert summary(folder)["steps"] == 150


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_step_is_named_with_the_place_where_it_hangs(run_of, started):
    config, _ = run_of(4000)
    run = started(config, "zero3", script=PLANTED, PLANTED="hang", PLANTED_RANK="1")
    output = run.ends_with(1, seconds=400)
    line = named(output)
    assert line.startswith("error: rank 1 on ") and "in step 7, has stood still for" in line
    assert "planted_train.py" in line and "loop/run.py" in line and "the others wait for it" in line
    assert "the main thread stands here" in output


@pytest.mark.slow
def test_a_rank_that_lacks_memory_ends_all_with_3_what_was_wanted_and_what_takes_less(run_of, started, tmp_path):
    """Said by the main process, where people look, though another one failed."""
    config, _ = run_of(4000)
    code = tmp_path / "code"
    run = started(config, "ddp", script=PLANTED, PLANTED="memory", PLANTED_RANK="1",
                  **{EXIT_CODE_FILE: str(code)})
    output = run.ends_with(0, seconds=120)
    assert code.read_text() == "3"
    line = named(output)
    assert line.startswith("error: rank 1 on ") and "in step 7" in line and "4294967296 bytes" in line
    assert "what costs least first" in output and "Traceback" not in output
    remedies = [mend.strip() for mend in output.split("what costs least first", 1)[1].splitlines() if "=" in mend]
    assert re.match(r"train\.tokens_per_micro_batch=\d+ \(smaller pieces; the same result\)", remedies[0])


@pytest.mark.slow
def test_where_nobody_watches_a_rank_that_fails_alone_says_why_and_the_command_ends_with_its_code(
        run_of, started, tmp_path):
    config, _ = run_of(4000)
    code = tmp_path / "code"
    run = started(config, "ddp", script=PLANTED, limit="null", PLANTED="memory", PLANTED_RANK="1",
                  **{EXIT_CODE_FILE: str(code)})
    output = run.ends_with(1, seconds=120)  # the launcher's, which is not asked where there is another
    assert code.read_text() == "3"
    line = named(output)
    assert line.startswith("error: rank 1 on ") and "in step 7" in line and "what costs least first" in output
