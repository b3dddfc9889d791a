"""What is on disk is whole, whatever the disk does meanwhile."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from peftune.disk import sha256
from peftune.errors import guarded
from peftune.loop import saving, skipped
from peftune.loop.checkpoint import all_checkpoints, folder_of, verify
from peftune.parallel.stop import Stop
from peftune.train import main
from tests.conftest import metric_rows, summary, write_config
from tests.faults.test_not_finite import overflowing
from tests.faults.test_preemption import same_run

EVERY_STEP = {"every_steps": 1}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True,
                             text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@dataclass(slots=True)
class Filling(Stop):
    """Fills the disk at one step and frees it at another. The loop looks at its stop before each step.

    What is being written when the disk is to be filled is finished first, so that each run loses the same checkpoints.
    """

    disk: Path = Path()
    full: range = field(default_factory=lambda: range(0))
    looks: int = 0

    def asked(self, next_s: float = 0.0) -> bool:
        self.looks += self.waiting  # not in the scores before training
        filler = self.disk / "filler"
        while self.looks == self.full.start and list(self.disk.glob("run/checkpoints/.*.draft")):
            time.sleep(0.01)
        if self.looks in self.full:
            fill(self.disk)
        if self.looks not in self.full:
            filler.unlink(missing_ok=True)
        return False


def fill(disk: Path) -> None:
    """Leave not a byte."""
    with (disk / "filler").open("ab", buffering=0) as stream:
        size = 2**20
        while size:
            try:
                stream.write(b"x" * size)
            except OSError:
                size //= 2


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("adapter", [{"method": "lora", "r": 4}, None], ids=["lora", "full"])
def test_a_full_disk_is_said_training_goes_on_and_saving_when_there_is_room(
        asynchronous, adapter, classify, train, small_disk, tmp_path, capsys):
    settings = {**classify, "adapter": adapter, "evaluation": {"every_steps": 100}}
    settings["checkpoint"] = {**EVERY_STEP, "asynchronous": asynchronous, "keep": 99}
    settings["train"] = {**settings["train"], "max_steps": 9}
    unbroken = train(settings, name="unbroken")
    folder = small_disk / "run"
    config = str(write_config({**settings, "output_dir": str(folder)}, tmp_path / "c"))
    capsys.readouterr()
    stop = Filling(disk=small_disk, full=range(4, 8))
    assert guarded(lambda words: main(words, stop), [config]) == 0
    said = capsys.readouterr().out
    assert all(words in said for words in (
        "cannot be written: ", "No space left on device", "the next checkpoint tries again"))
    saved = [int(path.name.removeprefix("step-")) for path in all_checkpoints(folder)]
    assert {1, 2, 8, 9} <= set(saved) < set(range(1, 10))
    for checkpoint in all_checkpoints(folder):
        verify(checkpoint)
    same_run(folder, unbroken)
    assert not list(folder.rglob("*.draft"))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("looks", [4, 8], ids=["while training", "at the end"])
def test_a_disk_that_stays_full_ends_the_run_with_2_and_the_next_start_finishes(
        asynchronous, looks, classify, train, small_disk, tmp_path, capsys):
    settings = {**classify, "evaluation": {"every_steps": 3}, "log": {"every_steps": 1}}  # with its TensorBoard
    settings["checkpoint"] = {"every_steps": 2, "asynchronous": asynchronous}
    unbroken = train(settings, name="unbroken")
    folder = small_disk / "run"
    config = str(write_config({**settings, "output_dir": str(folder)}, tmp_path / "c"))
    capsys.readouterr()
    stop = Filling(disk=small_disk, full=range(looks, 100))
    assert guarded(lambda words: main(words, stop), [config]) == 2
    said = capsys.readouterr()
    assert "error: " in said.err and "cannot be written: " in said.err and "No space left on device" in said.err
    assert "mend: make room on this disk" in said.err and "Traceback" not in said.err
    checkpoints = all_checkpoints(folder)
    for checkpoint in checkpoints:
        verify(checkpoint)
    assert checkpoints and not (folder / "summary.json").exists()
    assert guarded(main, [config]) == 2  # still full: said again, nothing harmed
    (small_disk / "filler").unlink()
    assert all_checkpoints(folder) == checkpoints
    assert guarded(main, [config]) == 0
    same_run(folder, unbroken)


def test_checkpoints_written_behind_the_steps_are_the_same_files(classify, train):
    folders = [train(classify, "checkpoint.every_steps=1", "checkpoint.keep=9", f"checkpoint.asynchronous={word}",
                     name=word) for word in ("true", "false")]
    names = [[path.name for path in all_checkpoints(folder)] for folder in folders]
    assert names[0] == names[1] and len(names[0]) == 6
    for name in names[0]:
        behind, before = (sorted((folder / "checkpoints" / name).glob("*.safetensors")) for folder in folders)
        assert [sha256(file) for file in behind] == [sha256(file) for file in before]
    same_run(*folders)


@dataclass(slots=True)
class Looking(Stop):
    """Notes the niceness of the threads that write checkpoints, and of the one that trains, before each step."""

    writing: set[tuple[str, int]] = field(default_factory=set)
    training: set[int] = field(default_factory=set)
    earlier: list[threading.Thread] = field(default_factory=threading.enumerate)

    def asked(self, next_s: float = 0.0) -> bool:
        self.training.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        self.writing.update((thread.name, os.getpriority(os.PRIO_PROCESS, thread.native_id or 0))
                            for thread in threading.enumerate()
                            if thread.name.startswith("checkpoint") and thread not in self.earlier)
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux alone")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_that_is_written_beside_the_steps_leaves_them_the_processor(
        asynchronous, classify, tmp_path):
    settings = {**classify, "checkpoint": {**EVERY_STEP, "asynchronous": asynchronous},
                "output_dir": str(tmp_path / "run")}
    stop, mine = Looking(), os.getpriority(os.PRIO_PROCESS, 0)
    assert guarded(lambda words: main(words, stop), [str(write_config(settings, tmp_path / "c"))]) == 0
    assert stop.training == {mine}
    the_last = ("checkpoint_0", mine)  # is waited for either way
    assert stop.writing == ({("checkpoint-beside_0", 19), the_last} if asynchronous else {the_last})


def test_what_dead_runs_left_unfinished_is_removed_and_never_loaded(classify, train, capsys):
    folder = train({**classify, "checkpoint": {"every_steps": 2, "keep": 9}})
    (folder / "summary.json").unlink()
    newest = folder / "checkpoints" / "step-000006"
    drafts = [folder / "checkpoints" / ".step-000008.draft", folder / "checkpoints" / ".step-000001.gone",
              folder / ".best.draft"]
    for draft in drafts:
        shutil.copytree(newest, draft)
    (folder / ".summary.json.draft").write_text("{")
    capsys.readouterr()
    train({**classify, "checkpoint": {"every_steps": 2, "keep": 9}})
    assert "continuing after step 6" in capsys.readouterr().out
    assert not any(path.exists() for path in (*drafts, folder / ".summary.json.draft"))
    assert summary(folder)["steps"] == 6


def test_a_row_that_a_stop_cut_in_half_is_written_again(classify, train):
    folder = train({**classify, "checkpoint": {"every_steps": 2, "keep": 9}})
    before = metric_rows(folder)
    (folder / "summary.json").unlink()
    for checkpoint in ("step-000006", "step-000004"):
        shutil.rmtree(folder / "checkpoints" / checkpoint)
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    train({**classify, "checkpoint": {"every_steps": 2, "keep": 9}})
    again = metric_rows(folder)
    assert [(row["step"], row["split"], row["loss"]) for row in again] == [
        (row["step"], row["split"], row["loss"]) for row in before]


def test_a_damaged_checkpoint_is_written_again_when_its_step_is_done_again(classify, train):
    settings = {**classify, "checkpoint": {"every_steps": 2, "keep": 9}}
    folder = train(settings)
    (folder / "summary.json").unlink()
    files = [folder / "checkpoints" / f"step-{step:06d}" / "tensors-00000-of-00001.safetensors"
             for step in (4, 6)]  # one while training, and the last
    before = [file.read_bytes() for file in files]
    for file in files:
        file.write_bytes(b"x")
    train(settings)
    assert [file.read_bytes() for file in files] == before
    for checkpoint in all_checkpoints(folder):
        verify(checkpoint)


def test_the_newest_checkpoint_is_the_one_of_the_largest_step(tmp_path):
    for step in (999_999, 1_000_000, 5, 1_000_001):
        folder_of(tmp_path, step).mkdir(parents=True)
    assert [folder.name for folder in all_checkpoints(tmp_path)] == [
        "step-000005", "step-999999", "step-1000000", "step-1000001"]


def refused_at(monkeypatch, module, name, file):
    plain = getattr(module, name)

    def write(path, *values):
        if path.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(path, *values)

    monkeypatch.setattr(module, name, write)


def test_a_full_disk_after_the_last_checkpoint_of_a_stopped_run_still_ends_it_with_75(
        classify, tmp_path, monkeypatch, capsys):
    refused_at(monkeypatch, saving, "write_json", saving.STOPPED)
    config = str(write_config(classify, tmp_path / "c"))
    assert guarded(lambda words: main(words, Stop(signal=15)), [config]) == 75
    said = capsys.readouterr()
    assert "stopped.json" in said.out and "No space left on device" in said.out and "Traceback" not in said.err


def test_a_full_disk_beside_a_skipped_step_is_said_and_training_goes_on(classify, train, monkeypatch, capsys):
    refused_at(monkeypatch, skipped, "write_text", skipped.SKIPPED)
    folder = train(overflowing(classify, 5))
    assert summary(folder)["skipped_steps"] == 1 and summary(folder)["steps"] == 6
    said = capsys.readouterr().out
    assert "skipped.jsonl" in said and "No space left on device" in said
