"""What lies in an adapter's folder, and who can load it."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peftune import cli
from peftune.errors import guarded
from peftune.model.save import load_trained
from peftune.reopen import _config_of_folder
from tests.conftest import summary, write_config

IDS = {"input_ids": torch.arange(5, 17).reshape(1, 12)}


@torch.no_grad()
def logits(model):
    return model.eval()(**IDS).logits


def test_transformers_finds_the_base_of_a_language_model_s_adapter_by_the_adapter_s_folder(converse, train):
    final = train(converse) / "final"
    assert not (final / "config.json").exists()
    theirs = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    ours = load_trained(final, AutoModelForCausalLM, dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(converse["model"]["name_or_path"], dtype=torch.float32)
    assert (logits(base) - logits(ours)).abs().max() > 1e-3


def test_an_adapter_that_holds_rows_of_added_tokens_or_classes_keeps_the_model_s_config(converse, tag, train):
    converse["model"]["added_tokens"] = ["<tool>"]
    rows = json.loads((train(converse, name="chat") / "final" / "config.json").read_text())["vocab_size"]
    base = AutoConfig.from_pretrained(converse["model"]["name_or_path"]).vocab_size
    assert rows == base + 1
    known = json.loads((train(tag, name="labels") / "final" / "config.json").read_text())
    assert len(known["id2label"]) > 2


def test_an_adapter_of_peft_alone_is_scored_and_talked_with_like_a_run_s(converse, train, tmp_path, capsys):
    run = train(converse)
    alone = tmp_path / "alone"
    shutil.copytree(run / "final", alone)
    (alone / "README.md").unlink()
    scores = []
    for name, more in ((run, []), (alone, ["--config", str(run / "config.yaml")])):
        capsys.readouterr()
        assert cli.main(["evaluate", str(name), *more, "--split", "validation", "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out)["validation"]["loss"])
    assert scores[0] == scores[1] == pytest.approx(summary(run)["metrics"]["validation"]["loss"], rel=1e-5)
    assert _config_of_folder(str(alone)).task == "causal_lm"


def test_an_adapter_is_no_model_to_train_on_and_the_mend_names_its_base(converse, train, tmp_path, capsys):
    final = train(converse, name="first") / "final"
    config = write_config({**converse, "model": {"name_or_path": str(final), "dtype": "float32"}}, tmp_path / "again")
    for command in (["check", str(config)], ["plan", str(config)]):
        capsys.readouterr()
        assert guarded(cli.main, command) == 2
        said = capsys.readouterr()
        assert "holds an adapter" in said.out + said.err
        assert f"model.name_or_path={converse['model']['name_or_path']}" in said.out + said.err
        assert f"adapter.init_from={final}" in said.out + said.err
