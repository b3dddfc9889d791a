"""A first config for somebody's data: what it is taken for, and what is refused."""

import json
import shlex
from pathlib import Path

import pytest

from peftune.cli import main
from peftune.config.load import load
from peftune.errors import PeftuneError
from tests import tiny
from tests.conftest import ROOT

TICKETS = "Message,Team\n" + "".join(
    f'"{row["text"]}, please",{row["label"]}\n' for row in tiny.intent_rows(40))
DATA = {"helpdesk": "sequence_classification", "tickets": "token_classification", "policies": "question_answering",
        "assistant": "causal_lm", "answers": "preference"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(*words):
    assert main(["init", *map(str, words)]) == 0


def faults_of(*words):
    with pytest.raises(PeftuneError) as caught:
        main(["init", *map(str, words)])
    return str(caught.value)


def test_columns_of_any_name_are_taken_for_texts_and_classes(here, capsys):
    (here / "tickets.csv").write_text(TICKETS)
    init("tickets.csv")
    config = load(["tickets.yaml"])
    assert config.task == "sequence_classification" and config.output_dir == "runs/tickets"
    assert config.data.columns == {"text": "Message", "label": "Team"}
    assert "label from the column Team, 2 classes" in capsys.readouterr().out


@pytest.mark.parametrize("name", DATA)
def test_each_task_is_found_from_the_columns_of_its_data(name, here):
    init(ROOT / "configs" / "data" / name / "train.jsonl", "--to", "c.yaml")
    config = load(["c.yaml"])
    assert (config.task, config.data.columns) == (DATA[name], {})


@pytest.mark.parametrize(("row", "task", "columns"), [
    ({"Question": "Why?", "Answer": "So.", "topic": "a"}, "causal_lm", {"prompt": "Question", "completion": "Answer"}),
    ({"dialogue": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "causal_lm",
     {"messages": "dialogue"}),
    ({"words": ["Ada", "sleeps"], "tags": ["B-person", "O"]}, "token_classification",
     {"tokens": "words", "ner_tags": "tags"}),
    ({"content": "no class in sight", "id": "7"}, "causal_lm", {"text": "content"}),
])
def test_other_usual_names_are_renamed(row, task, columns, here):
    (here / "rows.jsonl").write_text(json.dumps(row) + "\n")
    init("rows.jsonl")
    assert (load(["rows.yaml"]).task, load(["rows.yaml"]).data.columns) == (task, columns)


def test_fractions_in_a_csv_file_are_scores_to_predict(here):
    (here / "stars.csv").write_text("review,stars\nvery good,4.5\nbad it was,1.0\n")
    init("stars.csv")
    assert load(["stars.yaml"]).data.problem_type == "regression"


def test_given_columns_model_and_files_are_taken_over(here):
    (here / "t.csv").write_text("a,b,c\n" + "some long text,x,y\nanother long text,z,w\n" * 5)
    assert "could be the classes: b, c" in faults_of("t.csv")
    init("t.csv", "--columns", "label=c", "--model", "mine: yes", "--validation", "t.csv", "--test", "t.csv")
    config = load(["t.yaml"])
    assert config.data.columns == {"text": "a", "label": "c"}
    assert (config.model.name_or_path, config.data.validation, config.data.test) == ("mine: yes", "t.csv", "t.csv")


def test_what_cannot_be_known_is_asked_for_and_nothing_is_written(here):
    (here / "ab.csv").write_text("a,b\n1,2\n3,4\n")
    assert "columns a, b suit no task" in faults_of("ab.csv")
    assert "no column d for label" in faults_of("ab.csv", "--columns", "text=a", "label=d")
    assert "not EXPECTED=GIVEN" in faults_of("ab.csv", "--columns", "text")
    assert "use sequence_classification" in faults_of("ab.csv", "--task", "sorting")
    assert "no such file" in faults_of("nothing.csv")
    assert "--task" in faults_of("org/name")
    assert "data.validation" in faults_of("org/name", "--task", "preference", "--validation", "1.5")
    assert list(here.iterdir()) == [here / "ab.csv"]


def test_a_hub_id_with_a_task_needs_no_look_at_its_rows(here):
    init("org/name", "--task", "preference", "--columns", "chosen=good")
    assert load(["name.yaml"]).data.columns == {"chosen": "good"}


def test_an_existing_config_is_not_written_over(here):
    (here / "tickets.csv").write_text(TICKETS)
    (here / "tickets.yaml").write_text("mine")
    assert "is there already" in faults_of("tickets.csv")
    assert (here / "tickets.yaml").read_text() == "mine"


def test_the_five_commands_of_the_readme_lead_from_a_csv_file_to_a_model(here, encoder):
    """As they stand there, but for a tiny model, three steps, and no launcher."""
    from peftune.train import main as train

    (here / "tickets.csv").write_text(TICKETS)
    (here / "new.csv").write_text('id,Message\n7,"the screen, again"\n8,the badge works\n')
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own data in five commands")[2]
    lines = [shlex.split(line, comments=True) for line in section.split("```")[1].splitlines()[1:]]
    assert [line[1] for line in lines] == ["init", "train", "evaluate", "predict", "export"]
    for _, name, *words in lines:
        extra = {"init": ["--model", encoder], "train": ["train.max_steps=3", "data.max_length=64"]}.get(name, [])
        assert (train([*words, *extra]) if name == "train" else main([name, *words, *extra])) == 0
    predicted = Path("predicted.csv").read_text().splitlines()
    assert predicted[0].startswith("id,prediction,") and [row.partition(",")[0] for row in predicted[1:]] == ["7", "8"]
    exported = json.loads(Path("tickets-model/config.json").read_text())
    assert exported["architectures"] == ["BertForSequenceClassification"]
