"""The Python API: plain objects, the same numbers as the commands', nothing heavy at import."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peftune
from peftune import configure, fine_tune, open_run
from peftune.config.schema import DataConfig, ModelConfig, RunConfig
from peftune.errors import ConfigError, DataError, RunFolderError
from tests.conftest import ROOT, metric_rows, write_config


def test_a_run_from_python_has_the_scores_and_predictions_of_the_commands(classify, train, tmp_path):
    by_command = train(classify, name="command")
    run = fine_tune(configure({**classify, "output_dir": str(tmp_path / "python")}))
    commands = json.loads((by_command / "summary.json").read_text())
    assert run.summary["metrics"] == commands["metrics"]
    assert [row["loss"] for row in run.log if row["split"] == "train"] == [
        json.loads(line)["loss"] for line in (by_command / "metrics.jsonl").read_text().splitlines()
        if '"split": "train"' in line]
    metrics, records = run.evaluate()
    assert metrics["accuracy"] == run.summary["metrics"]["validation"]["accuracy"]
    again = open_run(run.folder)
    predicted = again.predict([{"text": record["text"]} for record in records])
    assert [row["prediction"] for row in predicted] == [record["prediction"] for record in records]
    assert not run.model.training and run.tokenizer.pad_token == "[PAD]"
    with pytest.raises(DataError, match="rows:2: the key text is missing"):
        again.predict([{"text": "fine"}, {"txt": "not"}])
    with pytest.raises(DataError, match="rows:2: a row is a dict, not str"):
        again.predict([{"text": "fine"}, "not"])
    with pytest.raises(ConfigError, match=r"no split is called 'nonsense'"):
        again.evaluate("nonsense")


def test_rows_cut_from_training_data_that_have_changed_are_not_scored(classify, train, write_rows):
    settings = {**classify, "data": {"train": classify["data"]["train"], "validation": 0.2, "max_length": 64}}
    run = open_run(train(settings))
    metrics, records = run.evaluate("validation")
    assert metrics == run.summary["metrics"]["validation"]
    rows, held = Path(settings["data"]["train"]), {record["text"] for record in records}
    kept = [row for row in map(json.loads, rows.read_text().splitlines()) if row["text"] not in held]
    write_rows(rows.name, kept)
    with pytest.raises(DataError, match=r"train\.jsonl: .* have changed since: rows that the run has learned from"):
        run.evaluate("validation")


@pytest.mark.parametrize("adapter", [{"method": "lora", "r": 4}, None], ids=["lora", "full"])
@pytest.mark.parametrize("task", ["classify", "converse"])
def test_a_checkpoint_scores_as_the_run_did_at_its_step(task, adapter, request, train):
    from peftune.reopen import open_trained, opened, score

    settings = {**request.getfixturevalue(task), "adapter": adapter, "checkpoint": {"every_steps": 3, "keep": 9}}
    folder = train(settings)
    known = {row["step"]: row["loss"] for row in metric_rows(folder, "validation")}
    assert len(set(known.values())) == 3
    for step in (3, 6):
        with opened(only_json=True) as (world, display):
            checkpoint = folder / "checkpoints" / f"step-00000{step}"
            found = score(open_trained(str(checkpoint), None, world, display), "validation")
        assert found.metrics["loss"] == pytest.approx(known[step], rel=1e-6)


def test_a_checkpoint_that_cannot_be_read_says_what_can(classify, train):
    from peftune.reopen import find_trained, open_trained, opened

    folder = train({**classify, "adapter": {"method": "lora", "r": 4, "init_lora_weights": "pissa"}})
    checkpoint = str(folder / "checkpoints" / "step-000006")
    with opened(only_json=True) as (world, display):
        with pytest.raises(RunFolderError, match="published in another form than they train in") as refused:
            open_trained(checkpoint, None, world, display)
        assert refused.value.faults[0].mend == f"give {folder}/final"
        open_trained(f"{folder}/final", None, world, display)
        with pytest.raises(RunFolderError, match="is a checkpoint, which only evaluate"):
            find_trained(checkpoint, None, needs_data=False)
        (folder / "final").rename(folder / "a")
        (folder / "best").rename(folder / "b")
        with pytest.raises(RunFolderError, match="has neither final/ nor best/"):
            open_trained(checkpoint, None, world, display)


def test_the_same_rows_cut_by_another_seed_are_not_scored_and_those_of_other_files_are(
        classify, train, write_rows, tmp_path, capsys):
    from peftune.cli import main
    from peftune.errors import guarded

    settings = {**classify, "data": {"train": classify["data"]["train"], "validation": 0.2, "max_length": 64}}
    folder = train(settings)
    other = write_config({**settings, "seed": 1}, tmp_path / "seed")
    assert guarded(main, ["evaluate", str(folder), "--config", str(other), "--split", "validation"]) == 2
    assert "the seed or the fraction is another" in capsys.readouterr().err
    elsewhere = {"train": classify["data"]["validation"], "validation": 0.5, "max_length": 64}
    other = write_config({**settings, "data": elsewhere}, tmp_path / "files")
    assert guarded(main, ["evaluate", str(folder), "--config", str(other), "--split", "validation"]) == 0


def test_a_config_made_by_hand_meets_the_same_rules(classify, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.lerning_rate"):
        configure({**classify, "train": {"lerning_rate": 1}})
    by_hand = RunConfig(task="sequence_classification", model=ModelConfig(name_or_path="m"),
                        data=DataConfig(train="t.jsonl", train_on="all"))
    with pytest.raises(ConfigError, match=r"train_on"):
        fine_tune(by_hand)
    path = write_config(classify, tmp_path / "c")
    assert configure(path, "train.batch_size=4").train.batch_size == 4
    with pytest.raises(TypeError):
        configure(classify, "train.batch_size=4")


@pytest.mark.parametrize("given", [
    "tickets.yaml", Path("tickets.yaml"), {"task": "causal_lm"}, None], ids=["file", "path", "dict", "None"])
def test_what_is_no_config_is_not_trained_and_the_call_that_makes_one_is_said(given):
    call = "'tickets.yaml'" if isinstance(given, str | Path) else "..."
    with pytest.raises(TypeError, match=re.escape(f"fine_tune(configure({call}))")):
        fine_tune(given)


@pytest.mark.parametrize("override", [{"train.batch_size": 4}, 3, None], ids=str)
def test_overrides_that_are_no_words_are_refused_with_the_form_of_words(override, classify, tmp_path):
    with pytest.raises(TypeError, match=r"key=value words, such as .*train\.batch_size=4"):
        configure(write_config(classify, tmp_path / "c"), override)


def test_a_folder_without_a_run_is_not_opened(tmp_path, classify):
    with pytest.raises(ConfigError, match="no run folder"):
        open_run(tmp_path)
    write_config(classify, tmp_path / "begun")
    (tmp_path / "begun" / "manifest.json").write_text("{}")
    with pytest.raises(RunFolderError, match="no trained weights"):
        open_run(tmp_path / "begun")
    (tmp_path / "begun" / "best").mkdir()
    (tmp_path / "begun" / "best" / "config.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"it continues; or give .*begun/best"):
        open_run(tmp_path / "begun")
    (tmp_path / "begun" / "best").rename(tmp_path / "begun" / "final")
    with pytest.raises(RunFolderError, match=r"no trained weights in checkpoints/\n  mend: give .*begun$"):
        open_run(tmp_path / "begun" / "checkpoints")


def test_importing_peftune_imports_nothing_heavy_and_names_its_public_objects():
    code = ("import sys, peftune; "
            "print(sorted({'torch', 'numpy', 'transformers', 'pydantic', 'yaml'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = "import sys; from peftune import configure, RunConfig; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert all(getattr(peftune, name).__doc__ for name in peftune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'train_it'"):
        _ = peftune.train_it
