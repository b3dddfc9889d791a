"""A loss or gradient that is not finite changes no weight, is written down, and does not go on for ever."""

import json

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.launches import launched
from peftune.errors import SelfCheckError, guarded
from peftune.loop.self_check import check_weights
from peftune.parallel.single import Single
from peftune.parallel.world import World
from peftune.train import main
from tests.conftest import ROOT, metric_rows, summary, write_config

FAULTY = ROOT / "tests" / "distributed" / "faulty_train.py"


def overflowing(settings, *numbers, label=3e38):
    """A regression some of whose targets are so large that float32 has no word for the square of their distance."""
    rows = [{"text": f"row {number} of many", "label": label if number in numbers else number / 10}
            for number in range(24)]
    path = settings["data"]["train"]
    with open(path, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return {**settings, "data": {"train": path, "validation": None, "max_length": 64, "problem_type": "regression"},
            "train": {**settings["train"], "batch_size": 4, "max_steps": 6, "lr_scheduler": "constant"},
            "evaluation": {}}


def test_a_step_that_overflows_is_skipped_with_its_examples_written_down_and_training_goes_on(classify, train, capsys):
    folder = train(overflowing(classify, 5))
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    path = classify["data"]["train"]
    assert len(skipped) == 1 and len(skipped[0]["examples"]) == 4 and f"{path}:6" in skipped[0]["examples"]
    assert summary(folder)["skipped_steps"] == 1 and summary(folder)["steps"] == 6
    rows = metric_rows(folder, "train")
    assert {row["step"] for row in rows} == set(range(1, 7)) - {skipped[0]["step"]}
    assert all(abs(row["loss"]) < 1e6 for row in rows)
    assert "no weight was changed" in capsys.readouterr().out
    assert summary(folder)["examples"] == 20


def test_too_many_skipped_steps_in_a_row_end_the_run_with_the_last_sound_checkpoint(classify, tmp_path, capsys):
    settings = overflowing(classify, *range(24))
    config = write_config({**settings, "train": {**settings["train"], "max_skipped_steps": 2}}, tmp_path / "c")
    assert guarded(main, [str(config)]) == 2
    said = capsys.readouterr().err
    assert "step 3: " in said and "train.max_skipped_steps = 2" in said and "skipped.jsonl" in said
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 3
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "tensors-00000-of-00001.safetensors")
    assert all(tensor.float().isfinite().all() for tensor in saved.values())
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "planted"), [
    ("ddp", ""), ("zero2", ""), ("zero3", ""), ("fsdp2", ""), ("zero2", "finite gradient"),
    ("zero3", "finite gradient")])
def test_every_strategy_skips_the_step_that_one_process_skips_and_trains_the_same_model(
        strategy, planted, classify, train, tmp_path):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
    settings = {**overflowing(classify, 5, label=1e25 if planted else 3e38), "adapter": {"method": "lora", "r": 4}}
    one = train(settings, name="one")
    two = tmp_path / "two"
    config = write_config({**settings, "output_dir": str(two)}, tmp_path / "two-config")
    done = launched(strategy, 2, [str(config)], script=FAULTY, environment={"PLANTED": planted})
    assert done.returncode == 0, done.stderr
    assert (two / "skipped.jsonl").read_text() == (one / "skipped.jsonl").read_text()
    assert summary(two)["skipped_steps"] == 1 and summary(two)["strategy"] == strategy
    losses = [[row["loss"] for row in metric_rows(folder, "train")] for folder in (one, two)]
    assert len(losses[0]) == 5 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    ours, theirs = (load_file(folder / "final" / "adapter_model.safetensors") for folder in (two, one))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


def test_weights_that_are_not_finite_never_reach_the_disk(classify, tmp_path, capsys):
    config = write_config(classify, tmp_path / "c")
    assert guarded(main, [str(config), "train.learning_rate=3.0e38", "train.lr_scheduler=constant",
                          "train.max_skipped_steps=100"]) == 2
    assert "nothing was saved" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_number_among_the_weights_is_found_and_named(value):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    strategy = Single(World(0, 1, 0, torch.device("cpu"), None))
    check_weights(model, strategy)
    model[1].weight.data[1, 2] = value
    with pytest.raises(SelfCheckError, match=r"1 weights are not finite.*1\.weight"):
        check_weights(model, strategy)
