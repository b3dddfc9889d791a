"""Real launches of one and of two processes train and score the same."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.parity import Asked, Cell, processes_of
from peftune.config.schema import TrainConfig
from peftune.tasks import TASKS
from tests.conftest import ROOT, free_port, metric_rows, summary, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROUNDED = {"loss", "perplexity", "margin", "chosen_reward", "rejected_reward"}
"""Metrics that are sums of floats; all others count."""
CANCELLING = {"margin", "chosen_reward", "rejected_reward"}
"""Those that are small differences of large sums."""


def one_and_two(task, method):
    """One process on padded rows, and two on packed or padded ones, with micro-batches of one example, of some, of all.
    """
    for strategy, name, tokens, layout in (("single", "one", 200, "padded"), ("ddp", "two-ones", 1, "packed"),
                                           ("ddp", "two-all", 100_000, "packed"), ("ddp", "two-padded", 300, "padded")):
        yield Asked(Cell(strategy, method, task, f"{layout}, several"), (f"train.tokens_per_micro_batch={tokens}",),
                    name=f"{name}-{task}-{method}")


@pytest.mark.parametrize("asked", [tuple(one_and_two(task, method)) for task in TASKS for method in ("lora", "full")],
                         ids=lambda asked: f"{asked[0].cell.task}-{asked[0].cell.method}")
def test_two_processes_with_packed_rows_train_and_score_as_one_with_padded_rows(bench, ran, asked):
    for each in asked:
        assert ran[each].returncode == 0, ran[each].stderr
        result = summary(bench.run_folder(each))
        assert (result["world_size"], result["strategy"]) == (processes_of(each.cell.strategy), each.cell.strategy)
    one, *others = map(bench.run_folder, asked)
    for two in others:
        mine, theirs = (metric_rows(folder, "train") for folder in (one, two))
        assert len(mine) == len(theirs) == 6
        for row, other in zip(mine, theirs, strict=True):
            assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
            assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
            assert (other["tokens"], other["supervised_tokens"]) == (row["tokens"], row["supervised_tokens"])
        scores, other_scores = (summary(folder)["metrics"]["validation"] for folder in (one, two))
        for metric, value in scores.items():
            name = metric.removesuffix("_interval")
            # exp turns the loss's absolute deviation, 1e-5 of itself, into a relative one
            relative = 1e-5 * max(1.0, scores["loss"]) if name == "perplexity" else 1e-5
            near = pytest.approx(value, rel=relative, abs=cancellation(one) if name in CANCELLING else None)
            assert other_scores[metric] == (near if name in ROUNDED else value), metric
        ids = [json.loads(line)["id"] for line in (two / "predictions" / "validation.jsonl").read_text().splitlines()]
        validation = yaml.safe_load((two / "config.yaml").read_text())["data"]["validation"]
        assert len(ids) == len(set(ids)) == len(Path(validation).read_text().splitlines())


def cancellation(folder):
    """How far rewards and margins of a preference run may lie apart beside a relative 1e-5.

    A reward is beta times the difference of two log-probabilities of a whole answer, a margin the difference of two
    rewards: up to four float32 sums of a hundred nats and more, which nearly cancel. Summed in another order each may
    come out one float32 spacing (2^-23 of its size) away, however small what is left of them is.
    """
    records = [json.loads(line) for line in (folder / "predictions" / "validation.jsonl").read_text().splitlines()]
    largest = max(abs(record[f"{side}_log_probability"]) for record in records for side in ("chosen", "rejected"))
    return TrainConfig().dpo_beta * 4 * 2**-23 * largest


def test_a_launch_that_starts_fewer_processes_than_asked_for_is_refused(command, classify, tmp_path):
    config = write_config(classify, tmp_path / "c")
    done = command("-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2",
                   ROOT / "peftune" / "train.py", config)
    assert "started one plain process" in done.stderr and "ddp-cpu.yaml" in done.stderr
    assert not (tmp_path / "run").exists()


def test_peftune_train_chooses_the_launcher_and_prints_its_line(command, classify, tmp_path):
    config = write_config(classify, tmp_path / "c")
    done = command("-m", "peftune.cli", "train", config, "--strategy", "ddp", "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert "accelerate launch --config_file" in done.stderr and "--num_processes 2" in done.stderr
    assert "Warning" not in done.stderr
    assert summary(tmp_path / "run")["world_size"] == 2


def test_a_fault_in_two_processes_is_one_message_and_exit_2(command, classify, tmp_path):
    settings = {**classify, "adapter": {"target_modules": ["nothing_has_this_name"]}}
    config = write_config(settings, tmp_path / "c")
    done = command("-m", "peftune.cli", "train", config, "--strategy", "ddp", "--processes", "2")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_harness_gives_the_same_scores_on_two_processes(command, classify, train):
    folder = train(classify)
    done = command("-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
                   ROOT / "launch" / "accelerate" / "ddp-cpu.yaml", "--main_process_port", free_port(),
                   "--module", "peftune.cli", "evaluate", folder, "--split", "validation", "--json",
                   env={"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    again, known = json.loads(done.stdout)["validation"], summary(folder)["metrics"]["validation"]
    for name in ("loss", "loss_interval"):  # threads may decide in which order losses are summed
        assert again.pop(name) == pytest.approx(known.pop(name), rel=1e-5)
    assert again == known
