"""Rows that are cut are said wherever a trained model reads them."""

import json

import pytest

from peftune.cli import main


@pytest.mark.parametrize(("task", "end", "longest"), [("classify", "end", 24), ("converse", "beginning", 120)])
def test_predict_says_how_many_records_it_cuts(task, end, longest, request, train, tmp_path, capsys):
    settings = request.getfixturevalue(task)
    folder = train({**settings, "data": {**settings["data"], "max_length": longest}, "train": {"max_steps": 1}})
    rows = [{"text": "the printer works again " * 30}, {"text": "fine"}]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    capsys.readouterr()
    assert main(["predict", str(folder), "--input", str(tmp_path / "new.jsonl"),
                 "--output", str(tmp_path / "said.jsonl")]) == 0
    assert f"1 of 2 records lose their {end}, over {longest} tokens" in " ".join("".join(capsys.readouterr()).split())


def test_evaluate_says_how_many_rows_it_cuts(classify, train, capsys):
    folder = train({**classify, "data": {**classify["data"], "max_length": 24}, "train": {"max_steps": 1}})
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--split", "validation", "--json"]) == 0
    said = capsys.readouterr()
    json.loads(said.out)
    assert "rows of validation are too long and were cut" in " ".join(said.err.split())
