"""The same command given again goes on, wherever the run was stopped and whatever has happened to its folder since."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from peftune import build
from peftune.errors import guarded
from peftune.loop.checkpoint import folder_of, is_whole
from peftune.parallel.stop import Stop
from peftune.train import main
from tests.conftest import metric_rows, summary, write_config
from tests.faults.test_preemption import AfterLooks, same_run


@pytest.mark.parametrize("file", ["config.yaml", "manifest.json"])
def test_a_disk_that_was_full_as_the_run_began_leaves_a_folder_in_which_it_can_begin(
        file, classify, tmp_path, monkeypatch, capsys):
    config = str(write_config(classify, tmp_path / "c"))
    with monkeypatch.context() as patched:
        for name in ("write_text", "write_json"):
            refuse(patched, name, file)
        assert guarded(main, [config]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert guarded(main, [config]) == 0 and summary(Path(classify["output_dir"]))["steps"] == 6


def refuse(monkeypatch, name: str, file: str) -> None:
    plain = getattr(build, name)

    def write(path, *values):
        if path.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(path, *values)

    monkeypatch.setattr(build, name, write)


def test_a_kill_before_the_config_is_whole_leaves_a_folder_in_which_the_run_can_begin(classify, train):
    folder = Path(classify["output_dir"])
    folder.mkdir()
    for left in (".lock", ".config.yaml.draft"):
        (folder / left).write_text("")
    train(classify)
    assert summary(folder)["steps"] == 6 and not (folder / ".config.yaml.draft").exists()
