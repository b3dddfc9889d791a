"""What a first config leaves out, and says: rows, columns, separators."""

import json
from pathlib import Path

import pytest

from peftune.config.load import load
from peftune.data.canonical import CANONICAL
from peftune.data.targets import RowFault
from tests.unit.test_starter import faults_of, init


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("header", "task", "empty"), [
    ("text,label", "sequence_classification", "label"), ("Message,label", "sequence_classification", "label"),
    ("prompt,completion", "causal_lm", "completion"), ("Question,Answer", "causal_lm", "Answer"),
])
def test_rows_without_a_label_or_completion_are_counted_and_change_no_task(header, task, empty, here, capsys):
    rows = "".join(f"some text {n},{'' if n % 4 == 0 else 'ab'[n % 2]}\n" for n in range(80))
    (here / "partly.csv").write_text(f"{header}\n{rows}")
    init("partly.csv")
    said = f"{empty} is empty in 20 of the 80 rows looked at: an error, unless data.on_bad_row=skip leaves them out\n"
    assert load(["partly.yaml"]).task == task and said in capsys.readouterr().out
    assert said in Path("partly.yaml").read_text()


def test_an_empty_label_is_no_class(here, capsys):
    (here / "partly.csv").write_text("text,label\nhello there,a\nworld,\nmore,b\n")
    init("partly.csv")
    assert "sequence_classification, 2 classes" in capsys.readouterr().out


def test_columns_of_a_format_that_no_row_fits_are_refused_with_the_reason(here):
    (here / "none.csv").write_text("prompt,completion\na,\nb,\n")
    said = faults_of("none.csv")
    assert "looks like causal_lm (prompt_completion), but completion is empty in 2 of the 2 rows" in said


def test_of_many_kinds_of_faults_the_rest_is_counted(here, capsys):
    bad = [{"text": "", "label": "a"}, {"text": "a"}, *({"text": "a", "label": {"x": n}} for n in range(2)),
           {"text": 1, "label": "a"}, {"text": 2, "label": "a"}]
    rows = [*bad, *({"text": "a", "label": "b"} for _ in range(9))]
    (here / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    init("t.jsonl")
    assert "\nlabel is a record in 2; text is empty in 1; label is empty in 1; other faults in 2 of the 15 rows" in (
        capsys.readouterr().out)


def test_a_label_that_is_empty_in_all_rows_is_said_to_be_empty(here, capsys):
    (here / "t.csv").write_text("text,label\nhello,\nworld,\n")
    init("t.csv")
    assert "t.yaml: causal_lm\nnot read: label (empty)\n" in capsys.readouterr().out


def test_an_empty_label_is_refused_as_empty():
    with pytest.raises(RowFault, match="label is empty"):
        CANONICAL["classification"]({"text": "hello", "label": ""})


@pytest.mark.parametrize("first", ["text", "Message"])
def test_a_column_called_label_is_the_label_whatever_others_hold(first, here, capsys):
    rows = [{first: f"some text {n}", "label": n % 2, "label_text": ("neg", "pos")[n % 2]} for n in range(20)]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    init("rows.jsonl")
    assert load(["rows.yaml"]).data.columns.get("label", "label") == "label"
    assert "\nnot read: label_text\n" in capsys.readouterr().out


def test_hypotheses_that_repeat_are_no_classes_beside_a_label(here):
    rows = "".join(f"the premise {n},it is so {n % 2},{'yes' if n % 3 else 'no'}\n" for n in range(20))
    (here / "nli.csv").write_text(f"premise,hypothesis,label\n{rows}")
    init("nli.csv")
    assert load(["nli.yaml"]).data.columns == {"text": "premise", "text_pair": "hypothesis"}


@pytest.mark.parametrize(("name", "separator"), [("t.csv", ";"), ("t.csv", "\t"), ("t.tsv", ","), ("t.tsv", "|")])
def test_another_separator_is_named_with_its_mend(name, separator, here):
    (here / name).write_text("text;label\nhello;a\nworld;b\n".replace(";", separator))
    assert f"the separator seems to be {separator!r}" in faults_of(name)
    assert "with commas as .csv" in faults_of(name, "--columns", "text=text")


def test_a_separator_inside_texts_is_none(here):
    (here / "t.csv").write_text("text;or not,label\nhello; you,a\nworld; me,b\n")
    init("t.csv", "--columns", "text=text;or not")


def test_columns_that_are_not_read_are_named_in_the_config_too(here):
    (here / "t.csv").write_text('text,label,id,"source\nof it"\nhello,a,1,x\nworld,b,2,y\n')
    init("t.csv")
    assert "\n  # not read: source of it\n" in Path("t.yaml").read_text()


def test_columns_that_a_format_takes_if_they_are_there_are_read(here, capsys):
    (here / "t.jsonl").write_text('{"instruction": "a", "input": "b", "system": "c", "output": "d"}\n')
    init("t.jsonl")
    assert "not read" not in capsys.readouterr().out


@pytest.mark.parametrize("spam", [0, 1])
def test_columns_of_zeros_and_ones_are_said_to_be_written_as_lists(spam, here, capsys):
    rows = "".join(f"some text {n},{n % 2},{spam * (n % 3 == 0):d}\n" for n in range(20))
    (here / "t.csv").write_text(f"text,toxic,spam\n{rows}")
    if spam:
        said = faults_of("t.csv")
        init("t.csv", "--columns", "label=toxic")
    else:
        init("t.csv")
        said = Path("t.yaml").read_text()
    assert "several classes" in said and '{"label": ["toxic"]}' in said
    out = capsys.readouterr().out
    assert "not read: spam\n" in out and "toxic, spam hold 0 and 1: " in out
