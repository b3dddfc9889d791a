"""What a run leaves behind, by task and method."""

import json

import pytest
import torch

from peftune.errors import guarded
from peftune.loop.finish import reload_tolerance
from peftune.train import main
from tests.conftest import EVERY_TASK, metric_rows, mostly_slow, summary, write_config

LEFT = {"classify": (0.75, 0.5), "tag": (0.5, 0.5), "answer": (0.9, 0.8), "converse": (0.93, 0.93),
        "prefer": (0.5, 0.5)}
"""Share of the loss that may be left after 60 steps: of the untrained model's in validation, of the first steps' in
training. The most that was seen over seeds and types: 0.54 and 0.12, 0.16 and 0.14, 0.76 and 0.58, 0.86 and 0.86, 0.05
and 0.12."""


@pytest.mark.parametrize("adapter", [{"method": "lora", "r": 4}, None], ids=["lora", "full"])
@pytest.mark.parametrize("task", mostly_slow(EVERY_TASK, "classify", "converse"))
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_run_learns_and_leaves_the_promised_folder(task, adapter, dtype, request, train):
    settings = request.getfixturevalue(task)
    settings = {**settings, "adapter": adapter, "model": {**settings["model"], "dtype": dtype}}
    settings["train"] = {**settings["train"], "max_steps": 60, "learning_rate": 0.003}
    settings["evaluation"] = {**settings["evaluation"], "metric": "loss"}
    folder = train(settings)
    result = summary(folder)
    assert result["steps"] == 60 and result["exit"] == "done"
    held_out, trained = LEFT[task]
    assert result["best"]["validation"]["loss"] < held_out * result["baseline"]["validation"]["loss"]
    assert result["reload_deviation"] < 1e-3
    for name in ("config.yaml", "manifest.json", "metrics.jsonl", "summary.json", "report.html",
                 "predictions/validation.jsonl", "final/tokenizer.json",
                 "final/README.md", "checkpoints/step-000060/manifest.json"):
        assert (folder / name).is_file(), name
    weights = "model.safetensors" if adapter is None else "adapter_model.safetensors"
    for place in (folder / "final", folder / "best"):
        assert (place / weights).is_file()
        assert (place / "config.json").is_file() == (adapter is None or task not in ("converse", "prefer"))
    rows = metric_rows(folder, "train")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert sum(row["loss"] for row in rows[-5:]) < trained * sum(row["loss"] for row in rows[:5])
    keys = {"step", "epoch", "split", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens",
            "tokens_per_second", "peak_memory_bytes", "seconds"}
    assert keys <= rows[0].keys()
    records = [json.loads(line) for line in (folder / "predictions" / "validation.jsonl").read_text().splitlines()]
    assert records and all({"id", "prediction", "reference"} <= record.keys() for record in records)


@pytest.mark.parametrize(("logit", "tolerance"), [(2.0, 0.5), (-30.0, 1.5), (torch.finfo(torch.float32).min, 5.0)])
def test_reloaded_logits_may_differ_by_what_rounding_does_to_logits_of_their_size(logit, tolerance):
    assert reload_tolerance(0.5, torch.tensor([0.0, logit])) == pytest.approx(tolerance)


@pytest.mark.parametrize("adapter", [
    {"method": "lora", "r": 4, "use_dora": True}, {"method": "lora", "r": 4, "use_rslora": True, "lora_dropout": 0.2},
    {"method": "ia3", "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    {"method": "vera", "r": 8, "target_modules": ["q_proj", "o_proj"]},
    {"method": "oft", "r": 0, "oft_block_size": 8, "target_modules": ["q_proj"]},
    {"method": "prompt_tuning", "num_virtual_tokens": 4}, {"method": "prefix_tuning", "num_virtual_tokens": 4},
], ids=lambda adapter: "-".join(map(str, adapter.values()))[:24])
def test_other_methods_train_and_reload_too(adapter, converse, train):
    folder = train({**converse, "adapter": adapter})
    result = summary(folder)
    assert result["trainable_parameters"] < result["total_parameters"] / 2
    assert result["reload_deviation"] <= 1e-4


def test_a_decoder_classifies_where_padding_is_its_end_of_text(classify, decoder, train):
    settings = {**classify, "model": {"name_or_path": decoder, "dtype": "float32"},
                "evaluation": {"every_steps": 10, "metric": "loss"}}
    settings["train"] = {**settings["train"], "max_steps": 40, "learning_rate": 0.01}
    result = summary(train(settings))
    assert result["best"]["validation"]["loss"] < result["baseline"]["validation"]["loss"]


def test_a_run_without_held_out_data_trains_and_publishes(classify, train):
    folder = train({**classify, "data": {**classify["data"], "validation": None}})
    result = summary(folder)
    assert result["metrics"] == {} and result["best_step"] is None
    assert (folder / "final" / "adapter_model.safetensors").is_file() and (folder / "report.html").is_file()


def test_plain_text_is_learned_whole(converse, train, write_rows):
    rows = [{"text": f"the printer number {i % 7} is broken again"} for i in range(40)]
    settings = {**converse, "data": {"train": write_rows("text.jsonl", rows), "validation": 0.2}}
    folder = train({**settings, "train": {**settings["train"], "learning_rate": 0.01, "max_steps": 20}})
    scores, before = (summary(folder)[key]["validation"] for key in ("metrics", "baseline"))
    assert scores["perplexity"] < 0.75 * before["perplexity"] and "exact_match" not in scores


def test_a_metric_that_the_validation_rows_cannot_have_is_refused_before_the_first_step(converse, tmp_path, write_rows,
                                                                                         capsys):
    rows = [{"text": f"the printer number {i % 7} is broken again"} for i in range(40)]
    settings = {**converse, "data": {"train": write_rows("text.jsonl", rows), "validation": 0.2},
                "evaluation": {"metric": "rouge_l", "patience": 1}}
    assert guarded(main, [str(write_config(settings, tmp_path / "c"))]) == 2
    assert "evaluation.metric = 'rouge_l': the validation rows hold no prompts" in capsys.readouterr().err
