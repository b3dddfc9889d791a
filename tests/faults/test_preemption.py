"""A run that is told to stop saves, ends with 75, and goes on as if it had not been stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from peftune.config.schema import seconds_of
from peftune.errors import EXIT_CODE_FILE, guarded
from peftune.parallel.stop import Stop
from peftune.train import main
from tests.conftest import ROOT, free_port, metric_rows, summary, training_processes, write_config

TRAIN = [sys.executable, str(ROOT / "peftune" / "train.py")]
KEPT = ("step", "epoch", "split", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "accuracy")


@dataclass(slots=True)
class AfterLooks(Stop):
    """Told to stop when the run has looked so many times whether it is."""

    looks: int = 0

    def asked(self, next_s: float = 0.0) -> bool:
        self.looks -= self.waiting
        return self.waiting and self.looks < 0


def told(folder: Path) -> list[dict]:
    return [{key: row[key] for key in KEPT if key in row} for row in metric_rows(folder)]


def same_run(ours: Path, theirs: Path) -> None:
    assert told(ours) == told(theirs)
    mine, other = (load_file(next((run / "final").glob("*.safetensors"))) for run in (ours, theirs))
    assert mine.keys() == other.keys() and all((mine[key] == other[key]).all() for key in other)
    for key in ("metrics", "baseline", "best", "best_step", "steps"):
        assert summary(ours)[key] == summary(theirs)[key]


@pytest.mark.parametrize("task", ["classify", "converse"])
@pytest.mark.slow
def test_stopped_at_every_place_where_it_looks_a_run_ends_as_the_unbroken_one(task, request, train, tmp_path, capsys):
    """Between steps, between the batches of an evaluation and of generation, and in the last scores."""
    settings = request.getfixturevalue(task)
    settings["evaluation"] = {**settings["evaluation"], "every_steps": 2}
    unbroken = train(settings, name="unbroken")
    folder = tmp_path / "stopped"
    config = str(write_config({**settings, "output_dir": str(folder)}, tmp_path / "c"))
    looks, codes, steps = 0, [], set()
    while not codes or codes[-1] == 75:
        codes.append(guarded(lambda words: main(words, AfterLooks(looks=looks)), [config]))  # noqa: B023
        if codes[-1] == 75:
            left = json.loads((folder / "stopped.json").read_text())
            stuck = left["step"] in steps
            steps.add(left["step"])
            assert (folder / left["checkpoint"]).is_dir() and left["exit_code"] == 75
            assert left["go_on"] == f"peftune train {folder / 'config.yaml'}"
        # one look further each time that it came no further, so that each place is met once
        looks = looks + 1 if codes[-1] == 75 and stuck else 0
    assert codes[-1] == 0 and len(codes) > 8 and steps == set(range(1, 7))
    assert not (folder / "stopped.json").exists()
    assert ": 6 of 6 steps are done and saved" in capsys.readouterr().err
    same_run(folder, unbroken)


def test_a_deadline_that_has_passed_costs_the_first_step_only(classify, train, tmp_path):
    unbroken = train(classify, name="unbroken")
    folder, codes = tmp_path / "late", []
    config = str(write_config({**classify, "output_dir": str(folder)}, tmp_path / "c"))
    while not codes or codes[-1] == 75:
        codes.append(guarded(main, [config, "deadline=1s"] if len(codes) < 3 else [config]))
        assert len(codes) < 5
    assert codes == [75, 75, 75, 0]
    same_run(folder, unbroken)


def test_a_far_deadline_changes_nothing_and_measures_a_checkpoint(classify, train):
    plain = train(classify, "checkpoint.every_steps=4", name="plain")
    timed = train(classify, "checkpoint.every_steps=4", "checkpoint.keep=9", "deadline=3h55m", name="timed")
    same_run(timed, plain)
    assert [path.name for path in sorted((timed / "checkpoints").iterdir())] == [
        "step-000001", "step-000004", "step-000006"]


@pytest.mark.parametrize(("text", "seconds"), [("3h55m", 14100), ("90m", 5400), ("45s", 45), ("1h1m1s", 3661)])
def test_durations_are_seconds(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "soon", "5", "3:55:00", "5m3h"])
def test_what_is_no_duration_is_refused_with_examples(text, classify, tmp_path, capsys):
    config = str(write_config({**classify, "deadline": text}, tmp_path / "c"))
    assert guarded(main, [config]) == 2
    said = capsys.readouterr().err
    assert "deadline" in said and "mend: use 3h55m, 90m or 45s" in said


@pytest.fixture(autouse=True)
def interruptible():
    """A shell ignores SIGINT in what it starts in the background, and children inherit that, as training should."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Started:
    """A command in the background, with what it says in files."""

    def __init__(self, words: list, folder: Path, **variables: str) -> None:
        self.said = folder / "stderr"
        with self.said.open("w") as stderr, (folder / "stdout").open("w") as stdout:
            self.process = subprocess.Popen([str(word) for word in words], stdout=stdout, stderr=stderr, cwd=ROOT,
                                            env={**os.environ, **variables})

    def wait_until(self, happened, seconds: float = 180) -> None:
        until = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < until, self.said.read_text()
            time.sleep(0.02)

    def ends_with(self, code: int, seconds: float = 60) -> str:
        assert self.process.wait(seconds) == code, self.said.read_text()
        return self.said.read_text()


def reached(folder: Path, step: int):
    return lambda: (folder / "metrics.jsonl").is_file() and any(
        row["split"] == "train" and row["step"] >= step for row in metric_rows(folder))


@pytest.fixture
def long(classify, tmp_path):
    """A run of many steps with few checkpoints, and its folder."""
    classify["train"]["max_steps"] = 400
    classify["checkpoint"] = classify["evaluation"] = {"every_steps": 300}
    folder = Path(classify["output_dir"])
    return write_config(classify, tmp_path / "c"), folder


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_the_process_with_75_and_leaves_nothing(long, tmp_path):
    config, folder = long
    code = tmp_path / "code"
    started = Started([*TRAIN, config], tmp_path, **{EXIT_CODE_FILE: str(code)})
    started.wait_until(lambda: any(tmp_path.glob("code.*")))  # it listens; torch is not imported yet
    started.process.send_signal(signal.SIGTERM)
    said = started.ends_with(0, seconds=5)
    assert code.read_text() == "75" and "stopped by SIGTERM before the first step" in said
    assert "Traceback" not in said and not folder.exists()


def test_a_signal_before_the_first_step_by_which_a_launcher_answers_a_death_is_no_pre_emption(tmp_path):
    """A cluster would start a run again and again that cannot begin."""
    code = tmp_path / "code"
    script = "import sys, time; from peftune.parallel.stop import listen; listen(); time.sleep(float(sys.argv[1]))"
    dies, lives = (Started([sys.executable, "-c", script, seconds], tmp_path, WORLD_SIZE="2",
                           **{EXIT_CODE_FILE: str(code)}) for seconds in ("0", "60"))
    dies.process.wait(30)
    lives.wait_until(lambda: len(list(tmp_path.glob("code.*"))) == 2)
    lives.process.send_signal(signal.SIGTERM)
    said = lives.ends_with(1, seconds=5)
    assert code.read_text() == "1" and "another process of this run has died" in said


def test_repetitions_within_two_seconds_are_one_request_and_a_later_one_stops_at_once(tmp_path):
    """The keyboard, a launcher and a cluster may each send the same request."""
    script = ("import time; from peftune.parallel.stop import listen; stop = listen(); stop.wait_for_steps(None)\n"
              "while not stop.asked(): time.sleep(0.01)\nprint('noted', flush=True); time.sleep(60)")
    started = Started([sys.executable, "-c", script], tmp_path, **{EXIT_CODE_FILE: str(tmp_path / "code")})
    started.wait_until(lambda: any(tmp_path.glob("code.*")))
    time.sleep(0.2)
    for _ in range(3):
        started.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    started.wait_until(lambda: "noted" in (tmp_path / "stdout").read_text())
    time.sleep(2.1)
    assert started.process.poll() is None
    started.process.send_signal(signal.SIGINT)
    assert "stopped at once by a second signal, SIGINT" in started.ends_with(0, seconds=5)
    assert (tmp_path / "code").read_text() == "130"


@pytest.mark.slow
def test_an_interrupt_of_peftune_train_ends_it_with_75_one_message_and_a_checkpoint(long, tmp_path):
    config, folder = long
    started = Started([sys.executable, "-m", "peftune.cli", "train", config], tmp_path)
    started.wait_until(reached(folder, 1))
    before = time.monotonic()
    started.process.send_signal(signal.SIGINT)
    said = started.ends_with(75)
    assert time.monotonic() - before < 20
    assert "SIGINT: saving after this step" in said and said.count("stopped: SIGINT came: ") == 1
    assert f"to go on: peftune train {folder / 'config.yaml'}, or" in said and "Traceback" not in said
    left = json.loads((folder / "stopped.json").read_text())
    assert left["why"] == "SIGINT came" and 0 < left["step"] < 400 and (folder / left["checkpoint"]).is_dir()


@pytest.mark.slow
def test_two_processes_stop_when_one_is_told_and_go_on_after_a_death_that_torchrun_mends(long, tmp_path):
    config, folder = long
    words = [sys.executable, "-m", "peftune.cli", "train", config, "--strategy", "ddp", "--processes", "2"]
    started = Started(words, tmp_path)
    started.wait_until(reached(folder, 5))
    os.kill(training_processes(folder.parent)[1], signal.SIGUSR1)
    said = started.ends_with(75)
    assert said.count("stopped: SIGUSR1 came: ") == 1 and "Traceback" not in said
    left = json.loads((folder / "stopped.json").read_text())
    assert left["go_on"].endswith("--strategy ddp --processes 2")

    started = Started([
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
        ROOT / "launch" / "accelerate" / "ddp-cpu.yaml", "--main_process_port", free_port(), "--max_restarts", "1",
        *TRAIN[1:], config, "checkpoint.every_steps=20"], tmp_path, ACCELERATE_USE_CPU="true")
    assert left["step"] < 340
    started.wait_until(reached(folder, left["step"] + 30))
    os.kill(training_processes(folder.parent)[1], signal.SIGKILL)
    started.ends_with(0, seconds=180)
    assert (tmp_path / "stdout").read_text().count("continuing after step") == 2
    Started([*words, f"output_dir={tmp_path / 'unbroken'}"], tmp_path).ends_with(0, seconds=180)
    same_run(folder, tmp_path / "unbroken")
