"""Tokens that the model does not know: their rows train, and are there again in plain peft and transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftune.config.schema import ModelConfig
from peftune.errors import PeftuneError
from peftune.model.resolve import load_tokenizer
from peftune.reopen import open_trained, score
from tests import tiny
from tests.conftest import mostly_slow, summary
from tests.unit.test_methods import TOLERANCE, first_state, in_plain_peft, logits, trained

ADDED = {"added_tokens": ["<tool>", "frobnicate"], "added_special_tokens": ["<|mark|>"]}
RESERVE = 512


@pytest.fixture(params=["untied", "tied", "reserve"])
def family(request, tmp_path):
    """A decoder with embeddings of its own for the output, with shared ones, or with rows in reserve."""
    path = tiny.save_decoder(tmp_path / "model", tie_word_embeddings=request.param == "tied")
    if request.param == "reserve":
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.resize_token_embeddings(RESERVE)
        model.save_pretrained(path)
    return request.param, path


@pytest.fixture
def calls(converse, write_rows, family):
    """Settings of a run whose answers hold the new tokens."""
    rows = [{"prompt": f"question {i}?", "completion": f" <tool> frobnicate<|mark|> the {tiny.NOUNS[i % 5]}"}
            for i in range(30)]
    _, path = family
    return {**converse, "model": {"name_or_path": path, "dtype": "float32", **ADDED},
            "data": {"train": write_rows("t.jsonl", rows[:24]), "validation": write_rows("v.jsonl", rows[24:])},
            "train": {**converse["train"], "max_steps": 30, "learning_rate": 0.02}}


def test_new_rows_begin_as_the_mean_of_the_old_ones_and_the_others_stay(calls, family, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(family[1], dtype=torch.float32)
    run, _ = first_state({**calls, "adapter": None}, tmp_path)
    tokenizer = run.evaluator.tokenizer
    known = len(tokenizer) - 3
    ids = tokenizer.convert_tokens_to_ids(["<tool>", "frobnicate", "<|mark|>"])
    assert sorted(ids) == list(range(known, known + 3))
    for mine, old in ((run.model.get_input_embeddings(), base.get_input_embeddings()),
                      (run.model.get_output_embeddings(), base.get_output_embeddings())):
        assert len(mine.weight) == max(len(tokenizer), len(old.weight))
        assert torch.equal(mine.weight[:known], old.weight[:known])
        assert all(torch.allclose(mine.weight[i], old.weight[:known].mean(0)) for i in ids)


@pytest.mark.parametrize("adapter", mostly_slow([
    {"method": "lora", "r": 4}, {"method": "lora", "r": 4, "init_lora_weights": "pissa"},
    {"method": "adalora", "init_r": 4, "target_r": 2}, None,
], {"method": "lora", "r": 4}), ids=["lora", "pissa", "adalora", "full"])
def test_added_tokens_train_save_reload_and_merge(adapter, calls, family, tmp_path):
    settings = {**calls, "adapter": adapter}
    run, result, inputs, live = trained(settings, tmp_path)
    assert result["metrics"]["validation"]["loss"] < 0.7 * result["baseline"]["validation"]["loss"]
    assert result["reload_deviation"] <= TOLERANCE
    loaded = in_plain_peft(settings, run.folder / "final")
    assert (logits(loaded, inputs) - live).abs().max() <= TOLERANCE
    rows = RESERVE if family[0] == "reserve" else len(AutoTokenizer.from_pretrained(run.folder / "final"))
    assert loaded.get_input_embeddings().weight.shape[0] == rows
    if adapter is not None:
        merged = loaded.merge_and_unload()
        assert (logits(merged, inputs) - live).abs().max() <= TOLERANCE
        merged.save_pretrained(tmp_path / "merged")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert (logits(loaded, inputs) - live).abs().max() <= TOLERANCE
    into, out = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert (into.data_ptr() == out.data_ptr()) is (family[0] == "tied")
    if family[0] == "tied":
        assert torch.equal(into, out)


def test_with_an_adapter_only_the_new_rows_train(calls, family, tmp_path):
    run, *_ = trained({**calls, "adapter": {"method": "lora", "r": 4}}, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(family[1], dtype=torch.float32)
    known = len(run.evaluator.tokenizer) - 3
    merged = run.model.merge_and_unload()
    tables = [(merged.get_input_embeddings().weight, base.get_input_embeddings().weight),
              (merged.get_output_embeddings().weight, base.get_output_embeddings().weight)]
    for mine, old in tables:
        assert torch.equal(mine[:known], old[:known])
        assert not torch.allclose(mine[known:known + 3], old[:known].mean(0).expand(3, -1), atol=1e-3)


@pytest.mark.slow
def test_a_run_with_added_tokens_is_scored_and_continued_from_its_folder(calls, family, tmp_path):
    run, _, _, live = trained({**calls, "adapter": {"method": "lora", "r": 4}}, tmp_path)
    reopened = open_trained(str(run.folder), None, run.strategy.world, run.journal._display)
    assert score(reopened, "validation").metrics["loss"] == pytest.approx(
        summary(run.folder)["metrics"]["validation"]["loss"], abs=1e-6)
    _, begun = first_state({**calls, "adapter": {"init_from": str(run.folder)}}, tmp_path)
    assert (begun - live).abs().max() <= TOLERANCE
    without = {**calls, "model": {"name_or_path": calls["model"]["name_or_path"], "dtype": "float32"},
               "adapter": {"init_from": str(run.folder)}}
    if family[0] != "reserve":
        with pytest.raises(PeftuneError, match="added_tokens"):
            first_state(without, tmp_path, "without")


@pytest.mark.slow
def test_an_encoder_learns_added_tokens_too(classify, write_rows, tmp_path):
    rows = [{"text": f"ticket {i}: <{'up' if i % 2 else 'down'}>", "label": "praise" if i % 2 else "complaint"}
            for i in range(40)]
    settings = {**classify, "model": {**classify["model"], "added_tokens": ["<up>", "<down>"]},
                "data": {"train": write_rows("t.jsonl", rows[:30]), "validation": write_rows("v.jsonl", rows[30:])}}
    settings["train"] = {**settings["train"], "max_steps": 160, "learning_rate": 0.003}
    run, result, inputs, live = trained(settings, tmp_path)
    assert result["metrics"]["validation"]["accuracy"] >= 0.8  # only the added tokens tell the classes apart
    loaded = in_plain_peft(settings, run.folder / "final")
    assert (logits(loaded, inputs) - live).abs().max() <= TOLERANCE


@pytest.mark.parametrize("key", ["added_tokens", "added_special_tokens"])
@pytest.mark.parametrize(("names", "said"), [(["p"], "p is a token already"),
                                             (["<a>", "<a>"], "<a> is a token already"), ([""], "as one token")])
def test_a_token_that_cannot_be_added_is_refused_under_its_own_key(key, names, said, decoder):
    model = ModelConfig.model_validate({"name_or_path": decoder, key: names})
    with pytest.raises(PeftuneError, match=said) as caught:
        load_tokenizer(model, decoder, generates=True)
    assert caught.value.faults[0].message.startswith(f"model.{key}: ")
