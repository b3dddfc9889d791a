"""Two roads, one number."""

import functools
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftune.loop.layout as choosing
from peftune.cli import main
from peftune.loop.generate import generate_texts
from tests import tiny
from tests.conftest import EVERY_TASK, metric_rows, mostly_slow, summary, write_config

ROUNDED = {"loss", "perplexity", "margin", "chosen_reward", "rejected_reward"}
"""Metrics that are sums of floats; all others count."""
LOSSES_RELATIVE = 1e-5
"""Float32: sums of a step are taken in another order."""


def losses(folder, split="train"):
    return [row["loss"] for row in metric_rows(folder, split)]


def scores(folder):
    found = summary(folder)["metrics"]["validation"]
    return {name: value for name, value in found.items() if not name.endswith("_interval")}


@pytest.mark.parametrize("task", mostly_slow(EVERY_TASK, "classify", "converse"))
@pytest.mark.parametrize("adapter", [
    {"method": "lora", "r": 4}, pytest.param(None, marks=pytest.mark.slow)], ids=["lora", "full"])
def test_micro_batches_of_one_of_three_and_of_all_packed_or_padded_train_the_same(task, adapter, request, train):
    settings = {**request.getfixturevalue(task), "adapter": adapter}
    one = train(settings, "train.tokens_per_micro_batch=1", "data.layout=padded", name="one")
    three = train(settings, "train.tokens_per_micro_batch=180", "data.layout=packed", name="three")
    every = train(settings, "train.tokens_per_micro_batch=100000", "data.layout=padded", name="all")
    packed = train(settings, "train.tokens_per_micro_batch=100000", "data.layout=packed", name="packed")
    for other in (three, every, packed):
        assert losses(other) == pytest.approx(losses(one), rel=LOSSES_RELATIVE)
        ours, theirs = scores(one), scores(other)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            tolerance = 1e-4 if name in ROUNDED else 0
            assert theirs[name] == pytest.approx(value, rel=tolerance, abs=tolerance / 10), name


@pytest.mark.parametrize("kind", ["a prompt in front of a classifier that reads the last token", "longrope"])
def test_models_whose_rows_depend_on_the_padding_beside_them_train_on_rows_of_equal_length(
    kind, decoder, request, train, tmp_path, capsys
):
    settings = request.getfixturevalue("converse" if kind == "longrope" else "classify")
    if kind == "longrope":
        settings = turned(settings, tmp_path)
    else:
        settings = {**settings, "model": {**settings["model"], "name_or_path": decoder},
                    "adapter": {"method": "prompt_tuning", "num_virtual_tokens": 4}}
    one = train(settings, "train.tokens_per_micro_batch=1", name="one")
    every = train(settings, "train.tokens_per_micro_batch=100000", name="all")
    assert "rows of equal length alone" in capsys.readouterr().out
    assert losses(every) == pytest.approx(losses(one), rel=LOSSES_RELATIVE)
    assert losses(every, "validation") == pytest.approx(losses(one, "validation"), rel=LOSSES_RELATIVE)


def turned(settings, tmp_path):
    """Settings of a model whose rotations depend on the longest row beyond 24 tokens."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4, "original_max_position_embeddings": 24}
    return {**settings, "model": {**settings["model"], "name_or_path": tiny.save_decoder(tmp_path / "turned",
                                                                                        rope_parameters=rope)}}


def test_scores_do_not_depend_on_long_rows_that_validation_alone_has(converse, train, write_rows, tmp_path, capsys):
    rows = [{"prompt": f"{i}?", "completion": f" {tiny.NOUNS[i % 5]}"} for i in range(12)]
    data = {"train": write_rows("short.jsonl", rows), "validation": write_rows("long.jsonl", [
        *rows, {"prompt": "why " * 20, "completion": " so"}])}
    settings = turned({**converse, "data": data, "evaluation": {"max_new_tokens": 0}}, tmp_path)
    folder = train(settings, "train.max_steps=1")
    assert "rows of equal length alone" in capsys.readouterr().out
    assert main(["evaluate", str(folder), "--split", "validation", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["validation"] == summary(folder)["metrics"]["validation"]


@pytest.mark.parametrize("reads", ["padding", "the longest row"])
def test_what_a_model_that_reads_its_neighbours_generates_does_not_depend_on_them(reads, converse, tmp_path):
    settings = turned(converse, tmp_path) if reads == "the longest row" else converse
    model = AutoModelForCausalLM.from_pretrained(settings["model"]["name_or_path"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"]["name_or_path"])
    prompts = {0: [5, 6, 7], 1: [9, 8, 7, 6, 5], 2: list(range(10, 40))}
    seen = []
    model.register_forward_pre_hook(lambda module, words, named: seen.append(named["input_ids"]), with_kwargs=True)
    say = functools.partial(generate_texts, model, tokenizer, max_new_tokens=4, device=torch.device("cpu"),
                            autocast=nullcontext, equal_lengths=reads == "padding")
    together = say(prompts)
    assert not any((ids == tokenizer.pad_token_id).any() for ids in seen), "no row is filled up"
    assert together == {key: text for one in prompts for key, text in say({one: prompts[one]}).items()}


def test_gradient_checkpointing_trains_the_same(converse, train):
    plain = train(converse, name="plain")
    recomputed = train({**converse, "model": {**converse["model"], "gradient_checkpointing": True}}, name="recomputed")
    assert losses(recomputed) == pytest.approx(losses(plain), rel=1e-6)


def test_a_run_from_its_resolved_config_is_the_same_run(classify, train, tmp_path):
    from peftune.train import main

    first = train(classify, name="first")
    assert main([str(first / "config.yaml"), f"output_dir={tmp_path / 'second'}"]) == 0
    assert losses(tmp_path / "second") == losses(first)


LOAD = """
import json, sys
from pathlib import Path
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
text, *saved = sys.argv[1:]
for task, folder in zip(saved[::2], saved[1::2]):
    auto = {"classify": AutoModelForSequenceClassification, "converse": AutoModelForCausalLM}[task]
    if (Path(folder) / "adapter_config.json").exists():
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
        classes = {"config": AutoConfig.from_pretrained(folder)} if task == "classify" else {}
        model = PeftModel.from_pretrained(auto.from_pretrained(base, **classes), folder)
    else:
        model = auto.from_pretrained(folder)
    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    print(json.dumps(model.eval()(**inputs).logits.tolist()))
"""


@pytest.mark.slow
def test_final_loads_elsewhere_without_peftune_to_the_same_logits(request, tmp_path):
    text, ours, words = "the printer is broken", [], []
    for task in ("classify", "converse"):
        for name, adapter in (("lora", {"method": "lora", "r": 4}), ("full", None)):
            folder = tmp_path / f"{task}-{name}"
            settings = {**request.getfixturevalue(task), "adapter": adapter, "output_dir": str(folder)}
            ours.append(live_logits(write_config(settings, tmp_path / f"c-{task}-{name}"), text))
            assert (folder / "final" / "adapter_config.json").exists() == (adapter is not None)
            words += [task, str(folder / "final")]
    theirs = subprocess.run([sys.executable, "-c", LOAD, text, *words], capture_output=True, text=True, check=True,
                            cwd="/")
    for mine, line in zip(ours, theirs.stdout.splitlines(), strict=True):
        assert flat(json.loads(line)) == pytest.approx(flat(mine), abs=1e-5)


def live_logits(config: Path, text: str):
    """Train, and ask the model in memory before it is gone."""
    import torch

    from peftune.build import build
    from peftune.config.load import load
    from peftune.loop.finish import finish
    from peftune.loop.fit import fit

    with build(load([str(config)])) as built:
        finish(built.run, fit(built.run, built.state))
        model = built.run.strategy.unwrap(built.run.model).eval()
        with torch.no_grad():
            return model(**built.run.evaluator.tokenizer(text, return_tensors="pt")).logits.tolist()


def flat(values):
    return [values] if not isinstance(values, list) else [x for value in values for x in flat(value)]


@pytest.mark.parametrize("adapter", [{"method": "lora", "r": 4}, None], ids=["lora", "full"])
@pytest.mark.parametrize("task", mostly_slow(EVERY_TASK, "classify", "converse"))
def test_the_harness_gives_a_finished_run_the_scores_of_its_summary(task, adapter, request, train, capsys):
    folder = train({**request.getfixturevalue(task), "adapter": adapter})
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--split", "validation", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["validation"]
    assert again == summary(folder)["metrics"]["validation"]


@pytest.mark.parametrize("task", mostly_slow(EVERY_TASK, "tag", "converse"))
def test_predict_gives_the_predictions_of_the_run(task, request, train, tmp_path):
    settings = request.getfixturevalue(task)
    if task == "converse":
        settings = {**settings, "data": {**settings["data"], "max_length": 250}}
    folder = train(settings)
    output = tmp_path / "out.jsonl"
    assert main(["predict", str(folder), "--input", settings["data"]["validation"], "--output", str(output)]) == 0
    made, known = (
        [json.loads(line)["prediction"] for line in path.read_text().splitlines()]
        for path in (output, folder / "predictions" / "validation.jsonl"))
    assert made == known and None not in made
    assert '"source": ":0"' not in output.read_text()


@pytest.mark.parametrize(("faults", "said"), [
    ([], "packed;"), (["they mix"], "packed (only in the first of two proofs they mix)"),
    (["they mix"] * 2, "padded (they mix)")])
def test_a_fault_of_packing_counts_when_it_is_there_again(faults, said, converse, train, capsys, monkeypatch):
    left = iter([*faults, None])
    monkeypatch.setattr(choosing, "packing_fault", lambda *_, **__: next(left))
    train({**converse, "train": {**converse["train"], "max_steps": 1}})
    assert said in capsys.readouterr().out
