"""A job that `peftune launch slurm` writes, on a real Slurm with two nodes."""

import os
import re
import signal

import pytest
from safetensors.torch import load_file

from tests.cluster.conftest import output, run, wait_for
from tests.conftest import ROOT, metric_rows, summary, training_processes, write_config

pytestmark = pytest.mark.slow

KEPT = ("step", "split", "loss", "learning_rate", "grad_norm", "tokens")


def state(job):
    return dict(word.partition("=")[::2] for word in output("scontrol", "show", "job", "-o", job).split())


def minutes_gone(job):
    hours, minutes, _ = state(job)["RunTime"].split(":")
    return 60 * int(hours) + int(minutes)


def steps_done(folder):
    return len(metric_rows(folder, "train")) if (folder / "metrics.jsonl").is_file() else 0


def test_a_job_on_two_nodes_saves_before_its_time_limit_is_queued_again_and_ends_as_an_unbroken_run(
        slurm, classify, launch, command, tmp_path, monkeypatch):
    classify["train"]["max_steps"] = 60
    classify["checkpoint"] = classify["evaluation"] = {"every_steps": 50}
    config = write_config(classify, tmp_path / "c")
    unbroken, folder = tmp_path / "unbroken", tmp_path / "job"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # of both runs: threads may decide in which order products are summed
    done = launch(config, f"output_dir={unbroken}", processes=2)
    assert done.returncode == 0, done.stderr

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = command("-m", "peftune", "launch", "slurm", config, f"output_dir={folder}", "--nodes", 2,
                   "--gpus-per-node", 0, "--name", "tiny", "--time", 10, "--notice", 150, "--submit",
                   cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    log = tmp_path / f"tiny-{job}.log"

    # Slurm looks at time limits every half minute: hold the run in the meantime
    wait_for(lambda: steps_done(folder) >= 3, f"three steps; the job's log: {log}")
    processes = training_processes(folder)
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        held = steps_done(folder)
        run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes_gone(job) + 2}")
        wait_for((tmp_path / f"tiny-{job}-processes" / "start-0" / "stop").exists, "the warning before the limit", 90)
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)
    assert len(processes) == 2
    wait_for(lambda: state(job).get("Restarts") == "1", "the job in the queue again", 60)
    run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert re.search(rf"USR1 came: \d+ of 60 steps are done and saved in {folder}/checkpoints/step-", log.read_text())
    wait_for(lambda: state(job)["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT"), "the end of the job")
    said = log.read_text()
    assert (state(job)["JobState"], state(job)["Restarts"], state(job)["ExitCode"]) == ("COMPLETED", "1", "0:0"), said

    again = int(re.search(r"continuing after step (\d+) from", said)[1])
    assert held <= again < 60
    assert summary(folder)["world_size"] == 2 and summary(folder)["strategy"] == "ddp"
    assert [{key: row[key] for key in KEPT} for row in metric_rows(folder, "train")] == [
        {key: row[key] for key in KEPT} for row in metric_rows(unbroken, "train")]
    mine, other = (load_file(run / "final" / "adapter_model.safetensors") for run in (folder, unbroken))
    assert mine.keys() == other.keys() and all((mine[key] == other[key]).all() for key in other)
    logs = sorted((tmp_path / f"tiny-{job}-processes").glob("start-*/node-*/*/attempt_0/0/stderr.log"))
    assert [path.parts[-6:-4] for path in logs] == [
        ("start-0", "node-0"), ("start-0", "node-1"), ("start-1", "node-0"), ("start-1", "node-1")]


def test_a_job_runs_in_the_folder_where_it_was_written_whatever_its_name(slurm, classify, command, tmp_path):
    folder = tmp_path / "our 'runs' #1" / "50 % 日"
    folder.mkdir(parents=True)
    done = command("-m", "peftune", "launch", "slurm", write_config(classify, tmp_path / "c"), "--nodes", 1,
                   "--gpus-per-node", 0, "--option", "comment=for us", "--python", "echo", "--submit", cwd=folder)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    wait_for(lambda: state(job)["JobState"] in ("COMPLETED", "FAILED"), "the end of the job")
    assert f"WorkDir={folder} " in output("scontrol", "show", "job", "-o", job)
    assert f"--log-dir config-{job}-processes/start-0" in (folder / f"config-{job}.log").read_text()
