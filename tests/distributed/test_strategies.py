"""Every strategy trains the model that one process trains. `peftune bench parity` runs the whole matrix."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.deviations import deviations_of
from benchmarks.launches import TRAIN, Run, launched_together
from benchmarks.parity import LAYOUTS, TOLERANCES, Asked, Bench, Cell
from peftune.config.load import load
from peftune.config.rules import strategy_faults
from peftune.parallel.launcher import choose_launch
from peftune.parallel.names import STRATEGIES
from tests.conftest import ROOT, metric_rows, summary
from tests.distributed.conftest import CHAIN, NEEDS_BITSANDBYTES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")

DIVIDING = ("zero1", "zero2", "zero3", "zero3-offload", "fsdp2")
FAULTY = ROOT / "tests" / "distributed" / "faulty_train.py"
LAYOUT = "packed, several"
assert LAYOUT in LAYOUTS
FEW = ("train.batch_size=1", "train.max_steps=10", "data.max_length=40")
"""One example a step leaves a rank with nothing; cut at 40 tokens, some examples have no target left."""


def cells():
    """Each strategy with both methods and three of the tasks, so that each task meets three strategies."""
    tasks = ("sequence_classification", "token_classification", "question_answering", "causal_lm", "preference")
    for i, strategy in enumerate(DIVIDING):
        for j in range(3):
            yield Cell(strategy, "full" if (i + j) % 2 else "lora", tasks[(i + 2 * j) % len(tasks)], LAYOUT)
    for strategy, method in (("zero3", "nf4+lora"), ("zero3", "int8+lora"), ("fsdp2", "nf4+lora"),
                             ("fsdp2", "int8+lora")):
        yield Cell(strategy, method, "causal_lm", LAYOUT)
    yield Cell("zero3", "dora", "causal_lm", LAYOUT)
    yield Cell("fsdp2", "dora", "sequence_classification", LAYOUT)


@pytest.mark.parametrize("asked", [
    pytest.param((Asked(cell),), id=str(cell), marks=[NEEDS_BITSANDBYTES] if "+" in cell.method else [])
    for cell in cells()])
def test_a_strategy_trains_scores_and_saves_as_one_process_does(bench, ran, asked):
    outcome = bench.outcome(asked[0], ran[asked[0]])
    assert outcome.verdict == "equal", (outcome.deviations, TOLERANCES, outcome.why)


@pytest.mark.parametrize("asked", [(Asked(Cell(strategy, "lora", "causal_lm", LAYOUT)),) for strategy in STRATEGIES],
                         ids=lambda asked: asked[0].cell.strategy)
def test_a_run_among_others_in_a_launch_is_the_run_that_a_user_launches_bit_for_bit(bench, ran, asked):
    (among,) = asked
    assert ran[among].returncode == 0, ran[among].stderr
    alone = replace(among, name=f"alone-{among.cell.strategy}")
    done = bench.run_alone(alone)
    assert done.returncode == 0, done.stderr
    assert summary(bench.run_folder(alone))["strategy"] == among.cell.strategy
    same_from(bench.run_folder(among), bench.run_folder(alone), 0)


@pytest.mark.parametrize("asked", [(Asked(Cell(strategy, "lora", "causal_lm", LAYOUT)),)
                                   for strategy in ("ddp", "zero2", "zero3")], ids=lambda asked: asked[0].cell.strategy)
def test_no_rank_repeats_a_library_s_warning_in_each_step(ran, asked):
    assert ran[asked[0]].returncode == 0 and "FutureWarning" not in ran[asked[0]].stderr, ran[asked[0]].stderr


def same_from(folder, other, steps):
    """The first run, which began after `steps` of the second, is the same."""
    mine, theirs = (metric_rows(run, "train") for run in (folder, other))
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [row[key] for row in mine] == [row[key] for row in theirs[steps:]]
    ours, weights = (load_file(next((run / "final").glob("*.safetensors"))) for run in (folder, other))
    assert ours.keys() == weights.keys() and all((ours[name] == weights[name]).all() for name in weights)
    assert summary(folder)["metrics"] == summary(other)["metrics"]


def planted(fault, strategy, method):
    return Asked(Cell(strategy, method, "causal_lm", LAYOUT), name=fault.replace(" ", "-"), script=FAULTY,
                 environment=(("PLANTED", fault),))


@pytest.mark.parametrize("asked", [
    (planted("divide once more", "ddp", "lora"),), (planted("drop a rank", "zero2", "lora"),),
    (planted("save the first shard", "fsdp2", "full"),), (planted("kill a rank", "ddp", "lora"),),
], ids=lambda asked: asked[0].name)
def test_a_planted_fault_turns_its_cell_red_and_no_other(bench, ran, asked):
    outcome = bench.outcome(asked[0], ran[asked[0]])
    assert outcome.verdict in ("differs", "failed")
    if asked[0].name == "save-the-first-shard":  # a run's own check of what it has saved comes before any comparison
        assert "what was saved does not reload" in outcome.why
    elif asked[0].name == "kill-a-rank":
        assert outcome.verdict == "failed" and not (bench.run_folder(asked[0]) / "summary.json").exists()
    else:
        assert outcome.deviations["grad_norm"] > 100 * TOLERANCES["grad_norm"]


@pytest.mark.parametrize("asked", [
    tuple(Asked(Cell(one, "lora", "causal_lm", LAYOUT), FEW, name=f"few-{one}") for one in ("single", strategy))
    for strategy in ("zero2", "zero3", "fsdp2")], ids=lambda asked: asked[1].cell.strategy)
def test_ranks_without_examples_or_targets_of_their_own_keep_step(bench, ran, asked):
    for one in asked:
        assert ran[one].returncode == 0, ran[one].stderr
    one, two = map(bench.run_folder, asked)
    losses = [[row["loss"] for row in metric_rows(folder, "train")] for folder in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 10
    assert summary(one)["metrics"]["validation"]["loss"] == pytest.approx(
        summary(two)["metrics"]["validation"]["loss"], rel=1e-5)


def broken_and_resumed(strategy, method):
    """A run that keeps its checkpoints, and one that begins with the second of them."""
    cell, often = Cell(strategy, method, "causal_lm", LAYOUT), "checkpoint.every_steps=2"
    unbroken = Asked(cell, (often,), name=f"unbroken-{strategy}-{method}")
    return unbroken, Asked(cell, (often, f"resume=RUNS/{unbroken.name}/checkpoints/step-000004"),
                           name=f"resumed-{strategy}-{method}")


@pytest.mark.parametrize("asked", [broken_and_resumed(strategy, method) for strategy in ("zero2", "zero3", "fsdp2")
                                   for method in ("lora", "full")], ids=lambda asked: asked[0].name)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(bench, ran, asked):
    unbroken, resumed = asked
    assert ran[unbroken].returncode == 0, ran[unbroken].stderr
    assert ran[resumed].returncode == 0 and "continuing after step 4" in ran[resumed].stdout, ran[resumed].stderr
    same_from(bench.run_folder(resumed), bench.run_folder(unbroken), 4)


def chained(method):
    """A run whose every step is made under another strategy."""
    for step, strategy in enumerate(CHAIN):
        before = f"resume=RUNS/chain-{method}-{CHAIN[step - 1]}/checkpoints/step-{step:06d}"
        yield Asked(Cell(strategy, method, "causal_lm", LAYOUT), (
            "checkpoint.every_steps=1", "checkpoint.keep=9", *([before] if step else [])),
            name=f"chain-{method}-{strategy}")


@pytest.mark.parametrize("asked", [tuple(chained("lora")), tuple(chained("full"))], ids=["lora", "full"])
def test_a_run_goes_on_under_any_other_strategy_and_number_of_processes(bench, ran, asked):
    want = [row["loss"] for row in metric_rows(bench.reference(asked[0].cell), "train")]
    for step, one in enumerate(asked):
        assert ran[one].returncode == 0, ran[one].stderr
        losses = [row["loss"] for row in metric_rows(bench.run_folder(one), "train")]
        assert losses == pytest.approx(want[step:], rel=1e-5)


PROMPT = "adapter={method: prompt_tuning, num_virtual_tokens: 4}"
EIGHT_BITS = "train.optimizer=adamw_8bit"


def beside_one(strategy, method, *overrides, script=TRAIN, environment=()):
    """A run with settings that the matrix has not, and the same on one process."""
    name = "".join(filter(str.isalnum, overrides[0]))
    return tuple(Asked(Cell(one, method, "causal_lm", "padded, several"), overrides, f"{one}-{name}", script,
                       environment) for one in ("single", strategy))


@pytest.mark.parametrize("asked", [
    beside_one("zero3", "lora", "model.added_tokens=['<a>']", "model.added_special_tokens=['<b>']"),
    beside_one("fsdp2", "lora", "adapter.trainable_token_indices=[3, 5]"),
    beside_one("fsdp2", "lora", "adapter.target_modules=[embed_tokens, lm_head]"),
    *(beside_one(strategy, "full", "train.weight_decay=0.5", "train.learning_rate=0.01")
      for strategy in ("zero2", "zero3", "fsdp2")),
    *(beside_one(strategy, "lora", "train.optimizer=sgd", "train.learning_rate=0.0001")
      for strategy in ("zero2", "zero3")),
], ids=lambda asked: asked[1].name)
def test_settings_that_the_matrix_has_not_train_as_on_one_process(bench, ran, asked):
    one, divided = asked
    assert ran[one].returncode == ran[divided].returncode == 0, ran[divided].stderr
    found = deviations_of(bench.run_folder(divided), bench.run_folder(one), "causal_lm")
    assert all(value <= TOLERANCES[name] for name, value in found.items()), found


def refused(strategy, method, *overrides):
    """A run that the rules refuse, without them."""
    return beside_one(strategy, method, *overrides, script=FAULTY, environment=(("PLANTED", "no rules"),))


@pytest.mark.parametrize("asked", [
    refused("zero2", "lora", "adapter={method: adalora}"), refused("fsdp2", "lora", "adapter={method: adalora}"),
    refused("fsdp2", "lora", PROMPT),
    pytest.param(refused("zero1", "full", EIGHT_BITS), marks=NEEDS_BITSANDBYTES),
    pytest.param(refused("fsdp2", "full", EIGHT_BITS), marks=NEEDS_BITSANDBYTES),
    refused("zero2", "lora", "model.pure_bf16=true", "model.dtype=bfloat16"),
], ids=lambda asked: asked[1].name)
def test_what_a_strategy_refuses_would_fail_or_train_another_model(bench, ran, asked):
    one, divided = asked
    config = load([str(bench.config(divided.cell)), *divided.overrides])
    assert strategy_faults(config, divided.cell.strategy) and not strategy_faults(config, "single")
    assert ran[one].returncode == 0, ran[one].stderr
    if ran[divided].returncode == 0:
        mine, other = (load_file(next((bench.run_folder(run) / "final").glob("*.safetensors"))) for run in asked)
        assert max((mine[name] - other[name]).abs().max() for name in other) > 10 * TOLERANCES["weights"]
    else:
        assert "Traceback" in ran[divided].stderr


def test_a_learned_prompt_would_wait_for_ever_under_zero_3(bench, tmp_path):
    run = Run([str(bench.config(Cell("zero3", "lora", "causal_lm", LAYOUT))), f"output_dir={tmp_path / 'run'}",
               PROMPT, "data.layout=padded"], FAULTY, {"PLANTED": "no rules"})
    (done,) = launched_together("zero3", 2, [run], tmp_path / "logs", limit_s=30)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_deepspeed_file_of_the_users_own_is_used_and_its_auto_values_filled_in(bench, tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "allgather_bucket_size": 5000}}))
    done, folder = launched_with(bench, own, tmp_path)
    assert done.returncode == 0, done.stderr
    assert summary(folder)["strategy"] == "zero2"


def test_a_deepspeed_file_that_decides_what_the_config_decides_is_refused(bench, tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5, "bf16": {"enabled": True},
                               "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}))
    done, folder = launched_with(bench, own, tmp_path)
    for key, ours in (("gradient_clipping", "train.max_grad_norm"), ("bf16", "model.dtype"),
                      ("optimizer", "train.optimizer")):
        assert f"{own}: {key}: the run's own config decides this" in done.stderr and f"set {ours}" in done.stderr
    assert done.stderr.count("error: ") == 1 and not folder.exists()


def test_a_preset_that_decides_beside_a_deepspeed_file_is_refused(bench, tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    done, folder = launched_with(bench, own, tmp_path, more="mixed_precision: 'no'\n")
    assert f"error: {own}: " in done.stderr and "mend: leave zero_stage" in done.stderr and not folder.exists()


def launched_with(bench: Bench, own: Path, tmp_path: Path, more: str = ""):
    cell, folder = Cell("zero2", "lora", "causal_lm", LAYOUT), tmp_path / "run"
    launch = choose_launch("zero2", 2, [str(bench.config(cell)), f"output_dir={folder}"])
    preset = tmp_path / "own.yaml"
    preset.write_text(f"compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\n"
                      f"{more}deepspeed_config: {{deepspeed_config_file: {own}}}\n")
    words = [str(preset) if word.endswith("zero2.yaml") else word for word in launch.command]
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *words], cwd=ROOT,
                          capture_output=True, text=True, env={**os.environ, **launch.environment})
    return done, folder
