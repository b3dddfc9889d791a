"""What stands beside prompts and answers when a first config is made, and names that it cannot hold."""

import json
import os
from pathlib import Path

import pytest

from peftune.cli import main
from peftune.config.load import load
from peftune.errors import guarded
from tests.conftest import write_config
from tests.unit.test_starter import faults_of, init

WANTED, UNWANTED = {"prompt": "a b?", "completion": "yes c"}, {"prompt": "d e?", "completion": "no f"}
SAID = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
ASKED = [{"question": f"what is it, {n}?", "context": f"it is number {n} of all", "answer": f"number {n}"}
         for n in range(8)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("rows", [
    [{**WANTED, "label": True}, {**UNWANTED, "label": False}],
    [{**WANTED, "label": "True"}, {**UNWANTED, "label": "0"}],
    [{"messages": SAID, "kto_tag": True}, {"messages": SAID, "kto_tag": False}],
    [{"instruction": "a", "output": "b", "KTO_tag": 1}, {"instruction": "c", "output": "d", "KTO_tag": 0}],
])
def test_answers_marked_as_wanted_or_not_are_learned_only_if_that_is_asked_for(rows, capsys):
    write("kto.jsonl", rows)
    assert "says which answers are wanted (KTO)" in faults_of("kto.jsonl") and not Path("kto.yaml").exists()
    init("kto.jsonl", "--task", "causal_lm")
    assert load(["kto.yaml"]).task == "causal_lm"
    assert "may say which answers are wanted: all are learned alike" in capsys.readouterr().out


def test_a_label_of_several_classes_beside_a_completion_is_no_such_mark():
    write("t.jsonl", [{**WANTED, "label": "tax"}, {**UNWANTED, "label": "law"}])
    init("t.jsonl")
    assert load(["t.yaml"]).task == "causal_lm"


def test_a_question_with_its_context_and_a_plain_answer_is_learned_with_the_context(capsys):
    write("asked.jsonl", ASKED)
    init("asked.jsonl")
    config = load(["asked.yaml"])
    assert config.task == "causal_lm"
    assert config.data.columns == {"instruction": "question", "input": "context", "output": "answer"}
    said = capsys.readouterr().out
    assert "not read" not in said and "most answers stand in their contexts: --task question_answering" in said


def test_a_column_that_is_said_to_be_the_prompt_stays_it(capsys):
    write("asked.jsonl", ASKED)
    init("asked.jsonl", "--columns", "prompt=question")
    assert load(["asked.yaml"]).data.columns == {"prompt": "question", "completion": "answer"}
    assert "not read: context" in capsys.readouterr().out


@pytest.mark.parametrize("words", [
    ["t.jsonl", "--to", "ODD.yaml"], ["t.jsonl", "--model", "ODD"], ["t.jsonl", "--test", "ODD"],
    ["--from-axolotl", "ODD"], ["causal_lm", "--columns", "prompt=ODD"],
])
def test_a_name_that_is_no_utf_8_is_refused_before_anything_is_written(words, here, capsys):
    write("t.jsonl", [WANTED])
    before = sorted(os.listdir(here))
    assert guarded(main, ["init", *(word.replace("ODD", os.fsdecode(b"na\xefve")) for word in words)]) == 2
    assert r"na\udcefve" in (said := capsys.readouterr().err) and "the name is not UTF-8" in said
    assert sorted(os.listdir(here)) == before


def test_a_line_end_in_the_name_of_the_data_does_not_end_the_comment_with_it(here):
    write("a\nb: c.jsonl", [WANTED])
    init("a\nb: c.jsonl", "--to", "t.yaml")
    assert load(["t.yaml"]).data.train == "a\nb: c.jsonl"


def test_a_run_folder_or_export_whose_name_is_no_utf_8_is_refused(classify, here, capsys):
    odd = os.fsdecode(b"na\xefve")
    config = str(write_config(classify, here / "c"))
    (here / odd).mkdir()
    (here / odd / "summary.json").write_text("{}")
    for words in (["report", odd], ["report", odd, odd], ["export", config, "--to", odd + "2"]):
        assert guarded(main, words) == 2
        assert "the name is not UTF-8" in capsys.readouterr().err
