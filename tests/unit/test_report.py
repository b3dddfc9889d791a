"""The page of a run, its verdict in words, and several runs side by side."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from peftune.cli import main
from peftune.errors import RunFolderError, guarded
from peftune.numerics.intervals import adjusted_for_many, two_sided_p
from peftune.observe.chart import LEFT, RIGHT, WIDTH, Curve, line_chart, thinned
from peftune.report.comparison import compare, joined
from peftune.report.outcomes import outcome
from peftune.report.page import write_report
from peftune.report.run_folder import Finished, open_finished
from peftune.report.sections import checks, command
from peftune.report.verdict import verdict
from tests.conftest import EVERY_TASK

ELSEWHERE = re.compile(r"(src|href)\s*=|@import|url\(|<link|<iframe|fetch\(|XMLHttpRequest|import\(")


@pytest.fixture
def finished(classify, train) -> Finished:
    return open_finished(train(classify))


def changed(run: Finished, **parts) -> Finished:
    """The run with other values in its summary."""
    return replace(run, summary={**run.summary, **parts})


def scored(value: float, low: float, high: float) -> dict:
    return {"loss": 1.0, "accuracy": value, "accuracy_interval": [low, high]}


def said(run: Finished) -> str:
    return "\n".join(f"{remark.kind}: {remark.text}" for remark in verdict(run))


def test_the_page_holds_scores_curves_and_config_and_loads_nothing_from_elsewhere(finished):
    page = (finished.folder / "report.html").read_text(encoding="utf-8")
    assert "validation accuracy" in page and "<polyline" in page and "learning_rate" in page
    assert "Confusion matrix" in page and "training rows" in page
    assert not ELSEWHERE.search(page)


@pytest.mark.parametrize("task", EVERY_TASK)
def test_every_task_shows_its_worst_examples_with_their_text(task, request, train):
    run = open_finished(train(request.getfixturevalue(task), "evaluation.max_new_tokens=2"))
    found = outcome(run)
    assert found is not None and found.rows and (found.worst or found.wrong == 0)
    assert all(len(text) > 3 for example in found.worst for name, text in example.parts[:1])
    assert all(example.parts[0][1][:20] in (run.folder / "report.html").read_text() for example in found.worst
               if example.parts[0][1].isascii() and "<" not in example.parts[0][1][:20])


def test_names_from_files_are_escaped(classify, train, tmp_path, write_rows):
    evil = "<img src=x onerror=alert(1)>"
    rows = [{"text": f"{i} <script>text", "label": evil if i % 2 else "b"} for i in range(20)]
    folder = train({**classify, "data": {"train": write_rows("<b>t.jsonl", rows), "validation": 0.3}})
    page = (folder / "report.html").read_text()
    assert "<img" not in page and "<b>t" not in page and page.count("<script>") == 1


def test_a_folder_without_a_finished_run_has_no_page(tmp_path):
    with pytest.raises(RunFolderError):
        write_report(tmp_path)


@pytest.mark.parametrize("runs", [1, 2])
def test_a_page_that_cannot_be_written_is_named_with_the_mend(runs, finished, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    assert guarded(main, ["report", *[str(finished.folder)] * runs, "--to", str(tmp_path / "folder")]) == 2
    assert f"{tmp_path / 'folder'}: cannot be written: Is a directory" in capsys.readouterr().err


def test_a_done_run_that_lacks_its_page_writes_it_at_the_next_start(classify, train):
    folder = train(classify)
    (folder / "report.html").unlink()
    train(classify)
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(("name", "text", "said"), [
    ("summary.json", "{", "summary.json: cannot be read"), ("summary.json", "[]", "summary.json: holds no record"),
    ("manifest.json", "{}", "manifest.json: lacks data"), ("config.yaml", "task: [", "config.yaml:1: not valid YAML"),
    ("metrics.jsonl", "{", "metrics.jsonl: cannot be read"),
    ("predictions/validation.jsonl", "x", "validation.jsonl: cannot be read: line 1")])
def test_a_damaged_file_of_a_run_is_named(name, text, said, finished, capsys):
    (finished.folder / name).write_text(text)
    assert guarded(main, ["report", str(finished.folder)]) == 2
    assert said in capsys.readouterr().err


def test_scores_of_a_run_whose_manifest_is_damaged_are_refused(classify, train, capsys):
    folder = train({**classify, "data": {**classify["data"], "validation": 0.3}})
    (folder / "manifest.json").write_text("")
    assert guarded(main, ["evaluate", str(folder), "--split", "validation"]) == 2
    assert "manifest.json: cannot be read" in capsys.readouterr().err


def test_a_model_no_better_than_the_untrained_one_or_than_a_guess_is_said_to_be_so(finished):
    score = {"validation": scored(0.6, 0.5, 0.7)}
    good = changed(finished, metrics=score, baseline={"validation": scored(0.1, 0, 0.2)}, majority={})
    assert said(good).startswith("good") and "better than the untrained model" in said(good)
    for key in ("baseline", "majority"):
        bad = changed(good, **{key: {"validation": scored(0.55, 0.5, 0.6)}})
        assert said(bad).startswith("bad") and "no better than" in said(bad)
    assert "worse than the untrained" in said(changed(good, baseline={"validation": scored(0.9, 0.8, 1.0)}))


def test_a_gap_beyond_chance_between_known_and_new_rows_is_called_overfitting(finished):
    new = {"validation": scored(0.6, 0.5, 0.7)}
    assert "Overfitted" in said(changed(finished, metrics=new, train_part={
        "rows": 9, "metrics": scored(0.99, 0.95, 1.0)}))
    assert "No overfitting" in said(changed(finished, metrics=new, train_part={
        "rows": 9, "metrics": scored(0.7, 0.6, 0.8)}))


def test_a_validation_loss_that_turns_up_is_named_with_its_step(finished):
    rows = [{"step": step, "split": "validation", "loss": loss} for step, loss in ((0, 2.0), (3, 1.0), (6, 1.5))]
    assert "turned up: lowest at step 3" in said(replace(finished, rows=rows))


@pytest.mark.parametrize("name", ["leaky.jsonl", "held: out.jsonl"])
def test_rows_that_stand_in_the_training_rows_too_are_scored_apart(name, classify, train, write_rows):
    known = [json.loads(line) for line in Path(classify["data"]["train"]).read_text().splitlines()][:5]
    new = [json.loads(line) for line in Path(classify["data"]["validation"]).read_text().splitlines()]
    run = open_finished(train({**classify, "data": {
        **classify["data"], "validation": write_rows(name, [*new, *known])}}))
    assert "5 rows of validation stand in the training rows too" in said(run)
    assert re.search(r"on 5 of them accuracy is [\d.]+, on the other 9 rows", said(run))


def test_a_run_differs_from_itself_by_nothing_and_from_a_better_one_by_more_than_chance(finished, tmp_path, capsys):
    better = shutil.copytree(finished.folder, tmp_path / "better")
    path = better / "predictions" / "validation.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**r, "prediction": r["reference"]}) + "\n" for r in records))
    wrong = shutil.copytree(finished.folder, tmp_path / "wrong")
    flip = {"praise": "complaint", "complaint": "praise"}
    (wrong / "predictions" / "validation.jsonl").write_text(
        "".join(json.dumps({**r, "prediction": flip[r["reference"]]}) + "\n" for r in records))
    found = compare([open_finished(folder) for folder in (wrong, better, wrong)])
    assert [d.verdict.split(" (")[0] for d in found.differences] == [
        "better than " + str(wrong), "no difference that these rows can show"]
    assert found.differences[0].difference == 1.0 and not found.settings.rows
    assert main(["report", str(wrong), str(better), "--to", str(tmp_path / "c.html"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["differences"][0]["rows"] == len(records) and set(answer["runs"]) == {"wrong", "better"}
    assert not ELSEWHERE.search((tmp_path / "c.html").read_text())


def test_rows_that_only_one_run_has_are_left_out_and_counted(finished, tmp_path):
    other = shutil.copytree(finished.folder, tmp_path / "other")
    path = other / "predictions" / "validation.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[2:]))
    found = compare([finished, open_finished(other)])
    assert found.differences[0].rows == 7 and "2 rows" in found.notes[0]


def test_the_page_of_a_long_run_with_many_classes_and_long_texts_stays_small(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "long")
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])
    (folder / "metrics.jsonl").write_text("".join(
        json.dumps({**row, "split": "train", "step": step, "loss": 1 / (step + 1)}) + "\n" for step in range(30_000)))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["data"]["classes"] = [f"class {n}" for n in range(700)]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "predictions" / "validation.jsonl").write_text("".join(json.dumps({
        "id": str(n), "prediction": f"class {n % 700}", "reference": f"class {n * 7 % 700}", "text": "long " * 5000,
        "loss_sum": 1.0, "num_targets": 1}) + "\n" for n in range(3000)))
    page, _ = write_report(folder)
    assert page.stat().st_size < 600_000
    assert "the worst 60 of 700 classes" in page.read_text()


def test_a_chart_keeps_every_spike_of_a_long_curve():
    points = [(float(x), 0.0) for x in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    kept = thinned(points, 200)
    assert (54_321.0, 9.0) in kept and len(kept) < 210 and kept[0] == points[0] and kept[-1] == points[-1]
    assert "9" in line_chart([Curve("<loss>", points)]) and "<loss>" not in line_chart([Curve("<loss>", points)])


def test_a_single_point_lies_over_the_one_label_of_its_step():
    drawn = line_chart([Curve("accuracy", [(6, 0.5)])])
    assert f'cx="{WIDTH - RIGHT:.1f}"' in drawn and ">step 6<" in drawn and ">6<" not in drawn


@pytest.mark.parametrize(("low", "high"), [
    (1.576, 1.603), (0.5538, 0.5551), (1000.1, 1000.4), (2.01e-4, 2.03e-4), (0, 1)])
def test_no_two_marks_of_an_axis_have_the_same_label(low, high):
    labels = re.findall(r'text-anchor="end">([^<s]+)</text>', line_chart([Curve("loss", [(0, low), (9, high)])]))
    assert len(labels) == len(set(labels)) > 2 and all(len(label) <= 9 for label in labels)


def test_settings_that_differ_are_written_as_in_a_config(classify, train):
    runs = [train(classify, "evaluation.patience=9", name="a"),
            train(classify, "model.reuse_frozen_layers=false", name="b")]
    settings = compare([open_finished(run) for run in runs]).as_json()["settings"]
    assert settings == {"evaluation.patience": ["9", "null"], "model.reuse_frozen_layers": ["true", "false"]}


def test_p_values_are_two_sided_and_raised_for_the_number_of_comparisons():
    import numpy as np

    assert two_sided_p(np.linspace(-1, 1, 1001)) == 1.0
    assert two_sided_p(np.ones(999)) == pytest.approx(0.002)
    assert adjusted_for_many([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_rows_of_equal_id_are_paired_in_their_order():
    ours, theirs = ([{"id": name, "reference": label, "prediction": label} for name, label in pairs] for pairs in (
        [("1", "a"), ("1", "b"), ("2", "c"), ("1", "d")], [("1", "a"), ("2", "c"), ("1", "b")]))
    pairs, left_out = joined(ours, theirs)
    assert [(mine["reference"], other["reference"]) for mine, other in pairs] == [("a", "a"), ("b", "b"), ("c", "c")]
    assert left_out == 1


def test_a_run_of_one_step_does_not_say_that_its_weights_moved(finished):
    said = checks(changed(finished, steps=1))[0]
    assert "took part" in said and "moved" not in said
    assert "moved" in checks(changed(finished, steps=2))[0]


def test_the_command_for_the_same_run_divides_its_sequences_too(finished):
    facts = {**finished.manifest["model"], "sequence_ranks": 4}
    run = replace(changed(finished, world_size=8, strategy="fsdp2"), manifest={**finished.manifest, "model": facts})
    assert command(run).endswith("--strategy fsdp2 --processes 8 --sequence-parallel 4")


def test_the_command_for_the_same_run_is_one_that_there_is(finished):
    """A DeepSpeed file of one's own may offload in stages that have no preset for it."""
    for name, preset in (("zero2-offload", "zero2"), ("zero3-offload", "zero3-offload")):
        assert command(changed(finished, world_size=2, strategy=name)).endswith(f"--strategy {preset} --processes 2")


def test_a_run_on_texts_that_hold_other_ends_of_lines_has_its_page(classify, train, write_rows):
    rows = [{"text": f"one\u2028two\x85 {i}", "label": "ab"[i % 2]} for i in range(20)]
    run = open_finished(train({**classify, "data": {"train": write_rows("t.jsonl", rows), "validation": 0.3}}))
    records = run.records("validation")
    assert len(records) == 6 and all("\u2028" in record["text"] for record in records)


def test_a_page_that_cannot_be_written_is_one_message(finished, tmp_path, capsys):
    for runs in ([finished.folder], [finished.folder, finished.folder]):
        assert guarded(main, ["report", *map(str, runs), "--to", str(tmp_path)]) == 2
        assert f"{tmp_path}: cannot be written" in capsys.readouterr().err


def test_the_longest_label_of_an_axis_has_room_beside_the_chart():
    page = line_chart([Curve("peak", [(1, 0.84940), (2, 0.84953)])])
    labels = re.findall(r'text-anchor="end">([^<]*)</text>', page.partition("<polyline")[0])[:-1]
    assert "0.84945" in labels and max(map(len, labels)) * 7 <= LEFT  # digits of 11 px are about 6.4 wide
