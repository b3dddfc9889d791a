"""A short fuzz of every kind of input; `peftune bench fuzz` is the long one."""

import subprocess
import sys

import pytest

from benchmarks.fuzz_config import settings
from peftune.config.load import load
from tests.conftest import ROOT, write_config


def test_what_is_spoilt_was_right_before(tmp_path):
    """Else all is refused, and no draw comes to what is checked of a config that loads."""
    config = load([str(write_config(settings("out"), tmp_path / "c"))])
    assert config.data.columns


@pytest.mark.slow
def test_hostile_input_of_every_kind_is_read_or_refused_with_its_place(tmp_path):
    """In a process of its own: an audit hook cannot be taken off again."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.fuzz", "--cases", "600", "--seed", "7"], cwd=ROOT,
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "600 cases, 0 bugs" in done.stdout, done.stdout[-4000:]
