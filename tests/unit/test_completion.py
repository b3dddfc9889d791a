"""Shell completion: what shtab makes of the commands works in bash."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

COMPLETE = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _shtab_peftune; echo "${{COMPREPLY[*]}}"
"""


def test_bash_completes_commands_options_and_their_values(tmp_path):
    pytest.importorskip("shtab")
    made = subprocess.run([sys.executable, "-m", "shtab", "--shell=bash", "peftune.cli.parser"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    script = tmp_path / "completion.bash"
    script.write_text(made.stdout)

    def complete(words):
        done = subprocess.run(["bash", "-c", COMPLETE.format(script=script, words=words)], capture_output=True,
                              text=True, check=True)
        return done.stdout.split()

    assert complete("peftune tr") == ["train"]
    assert complete("peftune launch k") == ["kubernetes"]
    assert complete("peftune train my.yaml --strat") == ["--strategy"]
    assert complete("peftune check my.yaml --strategy zero1") == ["zero1"]
