"""A model of a hub, by its name: asked for, downloaded and trained. The hub answers on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.conftest import ROOT, summary, write_config
from tests.hub import NAME, OLD_COMMIT, hub_of

pytestmark = pytest.mark.slow

TRAIN = ROOT / "peftune" / "train.py"
TELLS = """
import json, sys
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
import torch
from peftune.config.schema import ModelConfig
from peftune.model.load import load_weights
from peftune.tasks.text import quiet_libraries
quiet_libraries()
told = []
name = sys.argv[1]
load_weights(ModelConfig(name_or_path=name), name, AutoConfig.from_pretrained(name), AutoModelForCausalLM,
             dtype=torch.float32, new_head=False, device=torch.device("cpu"), tell=lambda *said: told.append(said))
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save_decoder(folder, hidden_size=256, intermediate_size=1024)  # some megabytes
    return folder


def python(words, hub, home, **more):
    """A process whose hub is ours, with an empty cache."""
    known = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = {**known, "HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
                   "PYTHONPATH": str(ROOT), **more}
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False,
                          env=environment, timeout=300)


def settings_of(tmp_path, name, **model):
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(json.dumps({"text": row["messages"][-1]["content"]}) + "\n" for row in tiny.chat_rows(40)))
    return write_config({"task": "causal_lm", "model": {"name_or_path": name, **model},
                         "data": {"train": str(rows), "validation": 0.25},
                         "train": {"batch_size": 8, "max_steps": 2}, "evaluation": {"max_new_tokens": 0},
                         "output_dir": str(tmp_path / "run")}, tmp_path / "config")


@pytest.fixture(scope="module")
def downloaded(model_folder, tmp_path_factory):
    """A run on the hub's model, the cache it left, and an address where no hub answers any more."""
    folder = tmp_path_factory.mktemp("downloaded")
    with hub_of(model_folder) as hub:
        done = python([TRAIN, settings_of(folder, NAME)], hub, folder / "home")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "run", folder / "home", hub


def test_a_model_is_found_by_its_name_downloaded_and_trained(downloaded):
    run, _, _ = downloaded
    assert summary(run)["steps"] == 2
    known = json.loads((run / "final" / "adapter_config.json").read_text())
    assert known["base_model_name_or_path"] == NAME


def test_a_name_that_the_hub_does_not_have_is_refused_with_2(model_folder, tmp_path):
    with hub_of(model_folder) as hub:
        done = python([TRAIN, settings_of(tmp_path, "some-org/other-model")], hub, tmp_path / "home")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the hub has no model some-org/other-model" in done.stderr


def test_a_download_is_told_in_megabytes_as_it_comes(model_folder, tmp_path):
    with hub_of(model_folder) as hub:
        done = python(["-c", TELLS, NAME], hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    size = (model_folder / "model.safetensors").stat().st_size // 10**6
    assert told and all(what == "downloaded MB" and total == size for what, _, total in told)
    counts = [done for _, done, _ in told]
    assert counts == sorted(counts) and counts[-1] == size
    assert not re.search(r"\d+%\|", done.stderr)  # no bar of the hub's own


@pytest.mark.parametrize("switched_off", [False, True])
def test_a_model_that_lies_here_already_needs_no_hub(downloaded, tmp_path, switched_off):
    run, home, silent = downloaded
    done = python([TRAIN, settings_of(tmp_path, NAME)], silent, home, **{"HF_HUB_OFFLINE": "1"} if switched_off else {})
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("the hub does not answer: the model is the cached one" in done.stdout + done.stderr) != switched_off
    assert "Retrying" not in done.stderr  # loading
    assert "config file" not in done.stderr and "Unable to fetch" not in done.stderr  # saving
    adapter = "final/adapter_model.safetensors"
    assert (tmp_path / "run" / adapter).read_bytes() == (run / adapter).read_bytes()


def test_a_run_on_a_revision_is_read_again_on_that_revision(model_folder, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(model_folder, old)
    weights = load_file(old / "model.safetensors")
    save_file({name: 0.5 * tensor for name, tensor in weights.items()}, old / "model.safetensors", {"format": "pt"})
    with hub_of(model_folder, old) as hub:
        config = settings_of(tmp_path, NAME, revision="old")
        done = python([TRAIN, config], hub, tmp_path / "home")
        assert done.returncode == 0, done.stderr[-2000:]
        said = python(["-m", "peftune.cli", "evaluate", tmp_path / "run", "--json"], hub, tmp_path / "other-home")
        final = tmp_path / "run" / "final"
        lines = (final / "README.md").read_text().split("```python\n")[1].split("```")[0]
        used = python(["-c", lines.replace("THIS_FOLDER", str(final))], hub, tmp_path / "third-home")
    assert said.returncode == 0, said.stderr[-2000:]
    again, before = json.loads(said.stdout)["validation"], summary(tmp_path / "run")["metrics"]["validation"]
    assert again["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert json.loads((final / "adapter_config.json").read_text())["revision"] == "old"
    assert used.returncode == 0, used.stderr[-2000:]
    for home in ("other-home", "third-home"):
        assert [path.name for path in (tmp_path / home).rglob("snapshots/*")] == [OLD_COMMIT]


def test_a_run_on_a_revision_is_scored_and_exported_on_that_revision(model_folder, tmp_path):
    older, cache = tmp_path / "older", tmp_path / "home" / "hub" / f"models--{NAME.replace('/', '--')}"
    older.mkdir()
    tiny.save_decoder(older, hidden_size=256, intermediate_size=1024, initializer_range=0.3)
    (cache / "refs").mkdir(parents=True)
    for revision, commit, folder in (("main", "a" * 40, model_folder), ("older", "b" * 40, older)):
        (cache / "refs" / revision).write_text(commit)
        shutil.copytree(folder, cache / "snapshots" / commit)

    def run(*words):
        done = python(words, "http://127.0.0.1:9", tmp_path / "home", HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    run(TRAIN, settings_of(tmp_path, NAME), "model.revision=older", "model.dtype=float32")
    again = json.loads(run("-m", "peftune", "evaluate", tmp_path / "run", "--json"))
    assert again["validation"]["loss"] == summary(tmp_path / "run")["metrics"]["validation"]["loss"]
    run("-m", "peftune", "export", tmp_path / "run", "--to", tmp_path / "merged", "--merge", "--into", "original")
    assert "revision='older'" in (tmp_path / "run" / "final" / "README.md").read_text()
