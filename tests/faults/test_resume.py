"""A run that was stopped ends as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT, metric_rows, summary, write_config

KEPT = ("step", "epoch", "split", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "accuracy")


def told(folder: Path) -> list[dict]:
    return [{key: row[key] for key in KEPT if key in row} for row in metric_rows(folder)]


def start_and_kill(config: Path, folder: Path, at_step: int) -> None:
    """Start a training process and kill it as soon as the row of a step is on disk."""
    process = subprocess.Popen([sys.executable, str(ROOT / "peftune" / "train.py"), str(config)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.is_file() and any(f'"step": {at_step},' in line and '"train"' in line
                                  for line in path.read_text().splitlines()):
            break
        time.sleep(0.005)
    assert process.poll() is None, process.stderr.read().decode()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "converse"])
@pytest.mark.parametrize("adapter", [{"method": "lora", "r": 4, "lora_dropout": 0.1}, None], ids=["lora", "full"])
def test_killed_and_started_again_is_the_unbroken_run_bit_for_bit(task, adapter, request, train, tmp_path):
    settings = {**request.getfixturevalue(task), "adapter": adapter}
    settings["train"] = {**settings["train"], "max_steps": 60}
    settings["checkpoint"] = {"every_steps": 7}
    settings["evaluation"] = {**settings["evaluation"], "every_steps": 20}
    unbroken = train(settings, name="unbroken")
    folder = tmp_path / "killed"
    config = write_config({**settings, "output_dir": str(folder)}, tmp_path / "killed-config")
    start_and_kill(config, folder, 23)
    assert not (folder / "summary.json").exists()
    done = subprocess.run([sys.executable, str(ROOT / "peftune" / "train.py"), str(config)], capture_output=True,
                          text=True, check=True)
    assert "continuing after step" in done.stdout
    assert told(folder) == told(unbroken)
    name = "model.safetensors" if adapter is None else "adapter_model.safetensors"
    ours, theirs = (load_file(run / "final" / name) for run in (folder, unbroken))
    assert all((ours[key] == theirs[key]).all() for key in theirs)
    assert summary(folder)["metrics"] == summary(unbroken)["metrics"]
    assert summary(folder)["baseline"] == summary(unbroken)["baseline"]


def test_starting_a_finished_run_again_trains_nothing_and_says_so(classify, train, capsys):
    folder = train(classify)
    before = told(folder)
    train(classify)
    assert "done before" in capsys.readouterr().out and told(folder) == before


def stopped_run(classify, train) -> Path:
    """A run folder as a kill after the last step would leave it."""
    folder = train({**classify, "checkpoint": {"every_steps": 2, "keep": 9}})
    (folder / "summary.json").unlink()
    return folder


def test_a_damaged_checkpoint_is_passed_over_loudly_for_the_one_before_it(classify, train, capsys):
    folder = stopped_run(classify, train)
    (folder / "checkpoints" / "step-000006" / "tensors-00000-of-00001.safetensors").write_bytes(b"x")
    capsys.readouterr()
    train({**classify, "checkpoint": {"every_steps": 2, "keep": 9}})
    said = capsys.readouterr().out
    assert "damaged checkpoint" in said and "continuing after step 4" in said
    assert summary(folder)["steps"] == 6


def test_a_stop_after_the_last_step_repeats_no_row(classify, train):
    folder = train(classify)
    before, result = told(folder), summary(folder)
    (folder / "summary.json").unlink()
    train(classify)
    assert told(folder) == before and summary(folder)["metrics"] == result["metrics"]


def test_a_checkpoint_that_is_not_the_newest_does_not_write_over_later_ones(classify, train, tmp_path, capsys):
    from peftune.errors import guarded
    from peftune.train import main

    folder = train(classify)
    config = str(write_config(classify, tmp_path / "again"))
    assert guarded(main, [config, f"resume={folder / 'checkpoints' / 'step-000004'}"]) == 2
    assert "would write over" in capsys.readouterr().err and summary(folder)["steps"] == 6


def test_only_the_newest_checkpoints_are_kept(classify, train):
    folder = train(classify)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000004", "step-000006"]


def test_a_named_checkpoint_continues_in_another_folder(classify, train, tmp_path):
    first = train({**classify, "checkpoint": {"every_steps": 2, "keep": 9}}, name="first")
    second = train(classify, f"resume={first / 'checkpoints' / 'step-000002'}", name="second")
    assert [row["loss"] for row in metric_rows(second, "train")] == [
        row["loss"] for row in metric_rows(first, "train")][2:]


def test_patience_stops_early_and_best_is_kept(classify, train):
    settings = {**classify, "evaluation": {"every_steps": 1, "patience": 2, "metric": "loss"}}
    settings["train"] = {**settings["train"], "learning_rate": 0.3, "max_steps": 40, "lr_scheduler": "constant",
                         "max_grad_norm": None}
    folder = train(settings)
    result = summary(folder)
    assert result["exit"] == "stopped_early" and result["steps"] < 40
    rows = metric_rows(folder, "validation")
    best = min((row for row in rows if row["step"] > 0), key=lambda row: row["loss"])
    assert result["best_step"] == best["step"]
    assert result["best"]["validation"]["loss"] == pytest.approx(best["loss"], rel=1e-6)
    assert json.loads((folder / "best" / "adapter_config.json").read_text())["peft_type"] == "LORA"
