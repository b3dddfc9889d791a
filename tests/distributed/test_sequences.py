"""Real processes that share each sequence train, score and save as one process does."""

import json

import pytest
import torch.multiprocessing as mp
from safetensors.torch import load_file

from benchmarks.deviations import deviations_of
from benchmarks.launches import launched
from benchmarks.parity import LAYOUTS, TOLERANCES, Bench, Cell
from tests.conftest import free_port, metric_rows, summary
from tests.distributed.exchanging import RANKS, attend_and_compare, divide_and_compare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PADDED = "padded, one micro-batch"
assert PADDED in LAYOUTS
ALONE = ("data.layout=packed", "train.tokens_per_micro_batch=1")
"""Each example in a row of its own: all are cut, answers lie in the last part, and hands end with empty rows."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


def divided(bench, strategy, method, name, *overrides, processes=2, ranks=2):
    folder = bench.folder / "runs" / name
    config = bench.config(Cell(strategy, method, "causal_lm", PADDED))
    done = launched(strategy, processes, [str(config), f"output_dir={folder}", *ALONE, *overrides],
                    sequence_ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert f"each sequence on {ranks}" in done.stdout
    return folder


@pytest.mark.parametrize(("strategy", "method", "processes", "ranks"), [
    ("ddp", "lora", 4, 2), ("zero2", "full", 2, 2), ("zero3", "lora", 2, 2), ("fsdp2", "full", 2, 2)])
def test_processes_that_share_each_sequence_train_score_and_save_as_one_does(bench, strategy, method, processes, ranks):
    folder = divided(bench, strategy, method, strategy, processes=processes, ranks=ranks)
    reference = bench.reference(Cell(strategy, method, "causal_lm", PADDED))
    found = deviations_of(folder, reference, "causal_lm")
    assert all(value <= TOLERANCES[name] for name, value in found.items()), found
    assert summary(folder)["tokens"] == summary(reference)["tokens"]
    assert [row["supervised_tokens"] for row in metric_rows(folder)] == [
        row["supervised_tokens"] for row in metric_rows(reference)]
    answers = [[json.loads(line)["prediction"] for line in
                (run / "predictions" / "validation.jsonl").read_text().splitlines()] for run in (folder, reference)]
    assert answers[0] == answers[1] and any(answers[0])
    if strategy == "fsdp2":
        resumed = divided(bench, strategy, method, "resumed", f"resume={folder / 'checkpoints' / 'step-000003'}")
        ours, theirs = (load_file(next((run / "final").glob("*.safetensors"))) for run in (resumed, folder))
        assert all((ours[name] == theirs[name]).all() for name in theirs)
        assert [row["loss"] for row in metric_rows(resumed, "train")] == [
            row["loss"] for row in metric_rows(folder, "train")[3:]]


def test_attention_over_exchanged_heads_and_its_gradients_are_those_of_the_whole_row():
    failures = mp.get_context("spawn").SimpleQueue()
    mp.spawn(attend_and_compare, (free_port(), failures), nprocs=RANKS)
    assert failures.empty(), failures.get()


def test_a_divided_adapter_begins_as_the_main_process_has_it():
    failures = mp.get_context("spawn").SimpleQueue()
    mp.spawn(divide_and_compare, (free_port(), failures), nprocs=RANKS)
    assert failures.empty(), failures.get()
