"""A run that was stopped ends as if it had not been."""

import json
from pathlib import Path
from shutil import copytree

import pytest

from benchmarks.faults import kill_and_compare, totals_of
from benchmarks.parity import Bench, Cell
from tests.conftest import metric_rows, summary, write_config

KEPT = ("step", "epoch", "split", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "accuracy")


def told(folder: Path) -> list[dict]:
    return [{key: row[key] for key in KEPT if key in row} for row in metric_rows(folder)]


@pytest.mark.slow
def test_killed_and_started_again_a_run_is_the_unbroken_one_bit_for_bit(tmp_path):
    """The short version of `peftune bench faults`: each kind of kill, both methods and layouts, up to two processes."""
    bench = Bench(tmp_path)
    cells = [Cell(strategy, method, task, layout) for strategy, method, task, layout in (
        ("single", "lora", "causal_lm", "packed, several"), ("single", "full", "sequence_classification",
         "padded, several"), ("fsdp2", "full", "causal_lm", "padded, several"),
        ("fsdp2", "lora", "token_classification", "packed, several"))]
    found = kill_and_compare(bench, cells, kills=3, seed=1)
    assert [why for one in found.values() for why in one.why] == []
    assert totals_of(found)["kills"] >= 9 and totals_of(found)["damaged_and_passed_over"]


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


def test_a_folder_that_somebody_put_beside_the_checkpoints_is_nobody_s_business(classify, train):
    folder = stopped_run(classify, train)
    copytree(folder / "checkpoints" / "step-000006", folder / "checkpoints" / "step-000006-copy")
    train({**classify, "checkpoint": {"every_steps": 2, "keep": 9}})
    assert summary(folder)["steps"] == 6 and (folder / "checkpoints" / "step-000006-copy").is_dir()


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


def test_what_each_start_ran_on_is_kept_and_shown(classify, train):
    often = {**classify, "checkpoint": {"every_steps": 2, "keep": 9}}
    first = train(often, name="first")
    manifest = json.loads((first / "manifest.json").read_text())
    (only,) = manifest["starts"]
    assert only == {"after_step": 0, **{key: manifest[key] for key in only if key != "after_step"}}
    assert {"packages", "commit", "device", "strategy", "world_size"} < {*only}
    older = {**only, "packages": {**only["packages"], "torch": "2.0.0"}}
    done_again = {**older, "after_step": 2}
    (first / "manifest.json").write_text(json.dumps({**manifest, "starts": [older, done_again]}))
    second = train(often, f"resume={first / 'checkpoints' / 'step-000002'}", name="second")
    third = train(often, f"resume={second / 'checkpoints' / 'step-000004'}", name="third")
    assert json.loads((third / "manifest.json").read_text())["starts"] == [
        older, {**only, "after_step": 2}, {**only, "after_step": 4}]
    assert f"after step 2 with torch {only['packages']['torch']}; " in (third / "report.html").read_text()
    assert "after step" not in (first / "report.html").read_text()


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


def test_patience_that_ends_with_the_last_step_stops_nothing_early(classify, train):
    settings = {**classify, "evaluation": {"every_steps": 1, "patience": 1, "metric": "loss"}}
    settings["train"] = {**settings["train"], "learning_rate": 0.3, "max_steps": 40, "lr_scheduler": "constant"}
    steps = summary(train(settings, name="first"))["steps"]
    assert steps < 40
    result = summary(train(settings, f"train.max_steps={steps}", name="second"))
    assert (result["exit"], result["steps"]) == ("done", steps)


def best_of_step_3(classify, train) -> Path:
    """A run of six steps whose best weights are those of step 3."""
    settings = {**classify, "checkpoint": {"every_steps": 1, "keep": 9},
                "evaluation": {"every_steps": 3, "metric": "accuracy"}}
    folder = train(settings, name="first")
    assert summary(folder)["best_step"] == 3, "of equal scores the first one is the best"
    return folder


def continued(classify, train, step: int) -> dict:
    settings = {**classify, "evaluation": {"every_steps": 3, "metric": "accuracy"}}
    return summary(train(settings, f"resume={Path(classify['output_dir']).parent}/first/checkpoints/step-00000{step}",
                         name=f"from-{step}"))


def test_the_best_weights_are_taken_along_from_the_run_of_a_named_checkpoint(classify, train, tmp_path):
    first = summary(best_of_step_3(classify, train))
    for step in (4, 6):
        second = continued(classify, train, step)
        assert second["best_step"] == 3 and second["best"] == first["best"]
        for file in (tmp_path / "first" / "best").iterdir():
            assert (tmp_path / f"from-{step}" / "best" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("left", ["nothing", "another step's"])
def test_best_weights_that_are_not_at_hand_are_forgotten_and_chosen_anew(classify, train, capsys, left):
    best = best_of_step_3(classify, train) / "best"
    if left == "nothing":
        best.rename(best.with_name("elsewhere"))
    else:
        (best / "step.txt").write_text("6\n")
    second = continued(classify, train, 6)
    assert "note: the best weights so far, of step 3, are not in" in capsys.readouterr().out
    assert second["best_step"] == 6 and second["best"] == second["metrics"]


def named(classify, tmp_path, capsys, resume: Path) -> tuple[int, str]:
    from peftune.errors import guarded
    from peftune.train import main

    config = write_config({**classify, "output_dir": str(tmp_path / "second")}, tmp_path / "again")
    capsys.readouterr()
    code = guarded(main, [str(config), f"resume={resume}"])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_a_named_checkpoint_is_refused_on_other_data_as_the_newest_is(classify, train, tmp_path, capsys):
    folder = train(classify)
    rows = Path(classify["data"]["train"])
    rows.write_text(rows.read_text().replace("praise", "@@").replace("complaint", "praise").replace("@@", "complaint"))
    code, said = named(classify, tmp_path, capsys, folder / "checkpoints" / "step-000004")
    assert code == 2 and "holds a run on other data: the files of train have changed" in said
    assert "mend: put the files back, or resume=auto" in said and not (tmp_path / "second").exists()


def test_a_named_checkpoint_without_its_run_says_that_its_data_are_not_known(classify, train, tmp_path, capsys):
    folder = train(classify)
    (folder / "manifest.json").unlink()
    code, said = named(classify, tmp_path, capsys, folder / "checkpoints" / "step-000004")
    assert code == 0 and "note: " in said and "whether its data were these is not known" in said


def test_a_folder_that_is_no_checkpoint_is_not_to_be_deleted(classify, train, tmp_path, capsys):
    folder = train(classify)
    for given, why in ((folder, "is a run folder, no checkpoint"), (folder / "final", "is no checkpoint"),
                       (tmp_path, "is no checkpoint")):
        code, said = named(classify, tmp_path, capsys, given)
        assert code == 2 and why in said and "delete" not in said
    assert f"resume=auto with output_dir={folder}, or resume={folder}/checkpoints/step-000006" in named(
        classify, tmp_path, capsys, folder)[1]
