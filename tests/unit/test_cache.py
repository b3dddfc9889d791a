"""Prepared data on disk: whole, or made again."""

import os
import time
from pathlib import Path

import pytest

from peftune.data import cache
from tests.conftest import metric_rows


def test_a_cache_in_the_home_folder_is_named_as_a_shell_would(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PEFTUNE_CACHE", "~/rows")
    assert cache.root() == tmp_path / "rows"


def test_drafts_that_killed_processes_left_in_the_cache_are_deleted_once_they_are_old(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTUNE_CACHE", str(tmp_path))
    old, at_work = (tmp_path / f".draft-{name}" for name in ("old", "new"))
    long_ago = time.time() - 2 * cache.ABANDONED_S
    for draft in (old, at_work):
        draft.mkdir()
        (draft / "train-00000.arrow").write_bytes(b"rows")
        os.utime(draft / "train-00000.arrow", (long_ago, long_ago))
        os.utime(draft, (long_ago, long_ago))
    (at_work / "train-00001.arrow").write_bytes(b"rows")
    cache.publish(tmp_path / "key", lambda draft: (draft / "meta.json").write_text("{}"))
    assert not old.exists() and at_work.exists() and (tmp_path / "key" / "meta.json").exists()



def prepared(draft: Path) -> None:
    (draft / "meta.json").write_text("{}")
    (draft / "train-00000.arrow").write_bytes(b"rows")
    (draft / "train-00001.arrow").write_bytes(b"more rows")


@pytest.mark.parametrize("file", ["meta.json", "train-00001.arrow", cache.SUMS])
@pytest.mark.parametrize("damage", ["lost", "empty", "cut", "a bit", "added"])
def test_prepared_data_that_are_not_as_they_were_written_are_made_again(file, damage, tmp_path, capsys):
    folder = tmp_path / "key"
    cache.publish(folder, prepared)
    assert cache.is_whole(folder) and "damaged" not in capsys.readouterr().err
    path = folder / file
    content = path.read_bytes()
    if damage == "lost":
        path.unlink()
    elif damage == "added":
        (folder / f"{file}-2").write_bytes(content)
    else:
        spoilt = {"empty": b"", "cut": content[:-1], "a bit": bytes([content[0] ^ 1]) + content[1:]}
        path.write_bytes(spoilt[damage])
    assert not cache.is_whole(folder)
    cache.publish(folder, prepared)
    assert cache.is_whole(folder) and f"{folder}: damaged data cache" in capsys.readouterr().err
    assert [left.name for left in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("name", ["train-00000.arrow", "validation-00000.arrow", "meta.json"])
def test_a_run_trains_on_its_rows_whatever_has_become_of_the_cache(name, classify, train, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTUNE_CACHE", str(tmp_path / "cache"))
    first = train(classify, name="first")
    file = next((tmp_path / "cache").glob(f"*/{name}"))
    file.write_bytes(file.read_bytes().replace(b"praise", b"prAise", 1)[:-1] + b" ")
    second = train(classify, name="second")
    assert [row["loss"] for row in metric_rows(second)] == [row["loss"] for row in metric_rows(first)]
