"""The page of a run."""

import re

import pytest

from peftune.errors import RunFolderError
from peftune.report import write_report


def test_the_page_holds_scores_curves_and_config_and_loads_nothing_from_elsewhere(classify, train):
    page = (train(classify) / "report.html").read_text(encoding="utf-8")
    assert "validation accuracy" in page and "<polyline" in page and "learning_rate" in page
    assert not re.search(r"(src|href)=|<script|@import|url\(", page)


def test_names_from_files_are_escaped(classify, train, tmp_path, write_rows):
    evil = "<img src=x onerror=alert(1)>"
    rows = [{"text": f"{i} text", "label": evil if i % 2 else "b"} for i in range(20)]
    folder = train({**classify, "data": {"train": write_rows("<b>t.jsonl", rows), "validation": 0.3}})
    assert "<img" not in (folder / "report.html").read_text() and "<b>t" not in (folder / "report.html").read_text()


def test_a_folder_without_a_finished_run_has_no_page(tmp_path):
    with pytest.raises(RunFolderError):
        write_report(tmp_path)
