"""The output folder: another run writes there, it cannot be written, it vanishes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from peftune.cli import main as cli
from peftune.errors import EXIT_CODE_FILE, guarded, report_exit_code
from peftune.loop.checkpoint import all_checkpoints, verify
from peftune.loop.lock import LOCK, FolderLock
from peftune.parallel.stop import Stop
from peftune.train import main
from tests.conftest import ROOT, write_config
from tests.faults.test_preemption import same_run
from tests.faults.test_saving import small_disk  # noqa: F401 (a fixture)


@dataclass(slots=True)
class At(Stop):
    """Does something when the loop looks for the so-manieth time whether to stop, before a step."""

    looks: int = 0
    does: Callable[[], None] = lambda: None

    def asked(self, next_s: float = 0.0) -> bool:
        if self.waiting:
            self.looks -= 1
            if self.looks == 0:
                self.does()
        return False


@pytest.fixture
def config(classify, tmp_path):
    classify["checkpoint"] = {"every_steps": 1}
    return str(write_config(classify, tmp_path / "c"))


@pytest.fixture
def disk(small_disk):  # noqa: F811
    yield small_disk
    while sum(f" {small_disk} " in line for line in Path("/proc/mounts").read_text().splitlines()) > 1:
        allow(small_disk)


def forbid(disk: Path) -> None:
    """Put a read-only view of a disk over itself, which files that are open for writing do not hinder."""
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)


def allow(disk: Path) -> None:
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_second_run_on_a_folder_is_refused_and_the_first_ends_as_if_alone(config, classify, train, capsys):
    alone = train(classify, name="alone")
    codes = []
    assert guarded(lambda words: main(words, At(looks=4, does=lambda: codes.append(guarded(main, [config])))),
                   [config]) == 0
    said = capsys.readouterr().err
    assert codes == [2] and f"another run writes there: process {os.getpid()} on " in said
    assert "choose another output_dir" in said
    same_run(Path(classify["output_dir"]), alone)


def test_the_lock_ends_with_its_process_however_that_ends(tmp_path):
    script = ("import sys, time; from pathlib import Path; from peftune.loop.lock import FolderLock\n"
              "lock = FolderLock(Path(sys.argv[1])); lock.take(); print('taken', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert other.stdout.readline() == "taken\n"
    with pytest.raises(ValueError, match=f"another run writes there: process {other.pid} on "):
        FolderLock(tmp_path).take()
    other.send_signal(signal.SIGKILL)
    other.wait()
    with FolderLock(tmp_path) as lock:
        lock.take()


def test_what_a_lost_machine_goes_on_with_is_waited_for(tmp_path, capsys):
    script = ("import sys, time; from pathlib import Path; from peftune.loop.lock import FolderLock\n"
              "lock = FolderLock(Path(sys.argv[1])); lock.take(); print('taken', flush=True); time.sleep(3)")
    other = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert other.stdout.readline() == "taken\n"
    (tmp_path / LOCK).write_text(json.dumps({"host": "node9", "process": 7}))
    ticks = []
    with pytest.raises(ValueError, match="another run writes there: process 7 on node9"):
        FolderLock(tmp_path).take()
    with FolderLock(tmp_path, 10) as lock:
        lock.take(lambda: ticks.append(1))
        assert other.wait(1) == 0 and ticks
    assert capsys.readouterr().err.count("process 7 on node9; waited for, 70 s at most") == 1


def test_a_folder_that_cannot_be_made_is_refused_before_the_model_is_loaded(classify, disk, tmp_path, capsys):
    config = str(write_config({**classify, "output_dir": str(disk / "a" / "run")}, tmp_path / "c"))
    forbid(disk)
    assert guarded(main, [config]) == 2
    allow(disk)
    said = capsys.readouterr()
    assert f"{disk} is read-only, or not yours" in said.err and "model" not in said.out


def test_a_tilde_that_no_shell_has_read_makes_no_folder_of_that_name(classify, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    config = str(write_config({**classify, "output_dir": "~/runs/a"}, tmp_path / "c"))
    for door, words in ((cli, ["check", config]), (main, [config])):
        assert guarded(door, words) == 2
        said = capsys.readouterr()
        assert "mend: output_dir=/home/ada/runs/a" in said.out + said.err and not (tmp_path / "~").exists()


@pytest.mark.parametrize(("output_dir", "why"), [
    ("file", "file: output_dir is a file"), ("file/run", "cannot be made: {}/file is a file"),
    ("nowhere", "nowhere: output_dir is a link that leads nowhere"),
    ("nowhere/run", "cannot be made: {}/nowhere is a link that leads nowhere"),
    ("mine", "holds other files (notes.txt) and no run")])
def test_an_output_dir_that_no_run_can_have_is_named_by_check_and_before_training(
        output_dir, why, classify, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    config = str(write_config({**classify, "output_dir": str(tmp_path / output_dir)}, tmp_path / "c"))
    for door, words in ((cli, ["check", config]), (main, [config])):
        assert guarded(door, words) == 2
        said = capsys.readouterr()
        assert why.format(tmp_path) in said.out + said.err and "model  " not in said.out


def test_a_disk_that_becomes_read_only_is_said_and_the_next_start_finishes(
        classify, train, disk, tmp_path, capsys):
    classify["checkpoint"] = {"every_steps": 1, "keep": 9}
    unbroken = train(classify, name="unbroken")
    folder = disk / "run"
    config = str(write_config({**classify, "output_dir": str(folder)}, tmp_path / "c"))
    assert guarded(lambda words: main(words, At(looks=4, does=lambda: forbid(disk))), [config]) == 2
    said = capsys.readouterr()
    assert "Read-only file system" in said.out and "the next checkpoint tries again" in said.out
    assert "Read-only file system" in said.err and "Traceback" not in said.err
    assert [verify(path) for path in all_checkpoints(folder)] == [None] * 2
    assert guarded(main, [config]) == 2 and "Read-only file system" in capsys.readouterr().err
    allow(disk)
    assert guarded(main, [config]) == 0
    same_run(folder, unbroken)
    forbid(disk)
    assert guarded(main, [config]) == 0  # done: there is nothing to write
    allow(disk)


def test_a_folder_that_vanishes_is_said_and_not_made_again(config, classify, capsys):
    folder = Path(classify["output_dir"])
    assert guarded(lambda words: main(words, At(looks=4, does=lambda: shutil.rmtree(folder))), [config]) == 2
    said = capsys.readouterr()
    assert said.out.count("it has vanished, with all that lay there") == 4  # best/, and steps 3, 4 and 5
    assert "it has vanished" in said.err and "mount its disk again" in said.err and "Traceback" not in said.err
    assert not folder.exists()
    assert guarded(main, [config]) == 0  # from the beginning


def test_a_file_system_without_locks_is_said_and_trained_on(tmp_path, monkeypatch, capsys):
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("peftune.loop.lock.fcntl.flock", without)
    with FolderLock(tmp_path) as lock:
        lock.take()
    assert "its file system has no locks (No locks available)" in capsys.readouterr().err


def test_a_disk_too_full_for_the_exit_code_leaves_none_behind(tmp_path, monkeypatch):
    code = tmp_path / "exit-code"
    code.symlink_to("/dev/full")
    monkeypatch.setenv(EXIT_CODE_FILE, str(code))
    assert report_exit_code(2) == 2
    assert not code.is_symlink()
