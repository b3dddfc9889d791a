"""Large libraries come without searches for garbage, and what a caller has is left as it was."""

import gc
import subprocess
import sys

import pytest

from peftune.imports import without_search_for_garbage
from tests.conftest import ROOT, mostly_slow


def test_what_was_imported_is_left_out_of_later_searches_and_they_go_on():
    code = """
import gc
from peftune.imports import without_search_for_garbage
seen = []
gc.callbacks.append(lambda phase, info: seen.append(phase))
before = gc.get_freeze_count()
with without_search_for_garbage():
    import pydantic.main
    assert not gc.isenabled()
assert not seen and gc.isenabled()
assert gc.get_freeze_count() > before + 10_000
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_garbage_of_before_is_not_kept_where_nothing_new_is_imported():
    frozen = gc.get_freeze_count()
    with without_search_for_garbage():
        import json  # noqa: F401
    assert gc.get_freeze_count() == frozen


@pytest.mark.parametrize("was_on", [True, False])
def test_searches_are_on_afterwards_only_if_they_were_before(was_on):
    try:
        (gc.enable if was_on else gc.disable)()
        with pytest.raises(ImportError), without_search_for_garbage():
            import peftune.no_such_module  # noqa: F401
        assert gc.isenabled() == was_on
    finally:
        gc.enable()


@pytest.mark.parametrize("command", mostly_slow(["train", "check", "plan"], "plan"))
def test_a_command_imports_its_libraries_without_a_search(command, tmp_path):
    (tmp_path / "c.yaml").write_text(
        "task: causal_lm\nmodel: {name_or_path: /nowhere}\ndata: {train: /nowhere.jsonl}\n"
        f"output_dir: {tmp_path}/run\n")
    code = f"""
import gc, sys
from peftune import cli, train
from peftune.errors import PeftuneError
searched = []
gc.callbacks.append(lambda phase, info: searched.append("torch" in sys.modules and "peft" not in sys.modules))
words = [{str(tmp_path / "c.yaml")!r}]
try:
    train.main(words) if {command!r} == "train" else cli.main([{command!r}, *words])
except PeftuneError:
    pass  # there is no such model
assert "peft" in sys.modules and not any(searched), searched
assert gc.isenabled() and gc.get_freeze_count() > 100_000
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
