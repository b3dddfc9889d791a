"""Exported folders: used by libraries we did not write, equal to the trained model, or not published."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from peftune import cli, export
from peftune.errors import guarded
from peftune.model import merge as merging
from tests import tiny
from tests.conftest import EVERY_TASK, mostly_slow
from tests.unit.test_methods import METHODS


@pytest.fixture
def run(request, train):
    """A run of the settings that a test names."""

    def of(name: str, *, steps: int = 3, **changes: object) -> Path:
        settings = request.getfixturevalue(name)
        return train({**settings, **changes, "train": {**settings["train"], "max_steps": steps}})

    return of


def exported(run: Path, *options: object, to: str = "exported") -> tuple[Path, dict]:
    target = run.parent / to
    assert cli.main(["export", str(run), "--to", str(target), *map(str, options)]) == 0
    return target, json.loads((target / "export.json").read_text())


def code(*words: object) -> int:
    return guarded(cli.main, [str(word) for word in words])


def predictions(run: Path, split: str = "validation") -> list[dict]:
    return [json.loads(line) for line in (run / "predictions" / f"{split}.jsonl").read_text().splitlines()]


def nothing_left(folder: Path) -> bool:
    return not folder.exists() and not [path for path in folder.parent.iterdir() if "draft" in path.name]


def test_merged_is_attached_to_1e4_in_float32_and_says_on_which_rows(run):
    _, record = exported(run("converse"), "--merge")
    assert record["kind"] == "merged" and record["dtype"] == "float32" and record["merged_into"]
    assert 0 < record["deviation"] <= 1e-4 <= record["tolerance"]
    assert record["rows"] == {"from": "validation rows of the run", "held_out": True, "count": 5}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= record["files"].keys()
    assert "adapter_config.json" not in record["files"]


@pytest.mark.parametrize("task", mostly_slow(EVERY_TASK, "classify", "converse"))
def test_every_task_merges_with_its_head_and_loads_in_plain_transformers(run, task):
    folder = run(task)
    merged, record = exported(folder, "--merge")
    assert record["deviation"] <= 1e-4
    rows = predictions(folder)
    if task == "classify":
        said = pipeline("text-classification", model=str(merged))([row["text"] for row in texts(folder)])
        assert [one["label"] for one in said] == [row["prediction"] for row in rows]
    elif task == "tag":
        said = pipeline("token-classification", model=str(merged), ignore_labels=[])("the printer is broken")
        assert {one["entity"] for one in said} <= set(json.loads((merged / "config.json").read_text())["label2id"])
    elif task == "answer":
        _, loaded = AutoModelForQuestionAnswering.from_pretrained(merged, output_loading_info=True)
        assert not loaded["missing_keys"] and not loaded["unexpected_keys"]  # transformers 5 has no pipeline for it
    else:
        said = pipeline("text-generation", model=str(merged))("question", max_new_tokens=3, return_full_text=False)
        assert isinstance(said[0]["generated_text"], str)


def texts(folder: Path) -> list[dict]:
    import yaml

    path = yaml.safe_load((folder / "config.yaml").read_text())["data"]["validation"]
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_an_adapter_as_it_is_works_in_plain_peft(run):
    folder = run("converse")
    copy, record = exported(folder)
    assert record["kind"] == "adapter" and record["deviation"] == 0.0
    assert (copy / "adapter_model.safetensors").read_bytes() == (
        folder / "final" / "adapter_model.safetensors").read_bytes()
    theirs = AutoPeftModelForCausalLM.from_pretrained(str(copy))
    assert isinstance(theirs, PeftModel)
    ids = torch.tensor([[3, 5, 8, 13]])
    merged, _ = exported(folder, "--merge", to="merged")
    plain = AutoModelForCausalLM.from_pretrained(str(merged))
    torch.testing.assert_close(theirs(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4, rtol=0)


def test_all_weights_are_exported_in_the_type_asked_for_and_in_shards(run):
    folder, record = exported(run("classify", adapter=None), "--dtype", "bfloat16", "--max-shard-size", "30KB")
    assert record["kind"] == "model" and record["dtype"] == "bfloat16"
    assert sum(name.startswith("model-0000") for name in record["files"]) > 1
    assert {t.dtype for path in folder.glob("*.safetensors") for t in load_file(path).values()} == {torch.bfloat16}
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16


def test_bfloat16_weights_merge_in_float32_and_are_rounded_once(run, converse):
    model = {**converse["model"], "dtype": "bfloat16"}
    _, record = exported(run("converse", model=model), "--merge")
    exact, again, rounded = (check["deviation"] for check in record["checks"])
    assert exact <= 1e-4 and again <= 1e-4 < rounded <= record["tolerance"] < 0.5


@pytest.mark.parametrize(("kind", "start"), mostly_slow(
    [("int8", True), ("nf4", True), ("nf4", "loftq")], ("nf4", True)))
def test_over_a_quantised_base_the_adapter_merges_into_the_values_it_trained_beside(run, converse, kind, start):
    pytest.importorskip("bitsandbytes", reason="needs the extra `quantization`")
    folder = run("converse", model={**converse["model"], "quantization": kind},
                 adapter={"method": "lora", "r": 4, "init_lora_weights": start})
    merged, record = exported(folder, "--merge")
    assert record["deviation"] <= 1e-4 and kind in record["merged_into"]
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.float32
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    _, other = exported(folder, "--merge", "--into", "original", to="original")
    assert other["distance_from_training_precision"] > 1e-3 > record["distance_from_training_precision"]
    copy, beside = exported(folder, to="beside")
    assert beside["kind"] == "adapter" and beside["deviation"] <= 1e-4
    assert "BitsAndBytesConfig" in (copy / "README.md").read_text()


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "adapter"])
def test_a_wrong_scale_is_caught_and_nothing_is_published(run, monkeypatch, capsys, merged):
    def scale_once_more(model, name):
        for module in model.modules():
            if isinstance(module, merging.BaseTunerLayer):
                module.scale_layer(1.01)
        return merging.merge(model, name)

    def copy_with_another_alpha(source, model, folder):
        real_copy(source, model, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * 1.01}))

    real_copy = export.copy_adapter
    folder = run("converse")
    monkeypatch.setattr(export, *(("merge", scale_once_more) if merged else ("copy_adapter", copy_with_another_alpha)))
    target = folder.parent / "wrong"
    capsys.readouterr()
    assert code("export", folder, "--to", target, "--json", *(["--merge"] if merged else [])) == 1
    said = capsys.readouterr()
    assert "logits differ by" in said.err and nothing_left(target)
    told = json.loads(said.out)
    assert told["published"] is False and "logits differ by" in told["faults"][0]["message"]


def test_biases_of_its_own_over_layers_that_have_none_are_refused_with_a_mend(run, capsys):
    folder = run("converse", adapter={"method": "lora", "r": 4, "target_modules": ["q_proj"], "lora_bias": True})
    capsys.readouterr()
    assert code("export", folder, "--to", folder.parent / "wrong", "--merge") == 2
    said = capsys.readouterr().err
    assert "cannot be merged" in said and "q_proj" in said and "without --merge" in said and "Traceback" not in said
    assert nothing_left(folder.parent / "wrong")
    exported(folder, to="beside")


@pytest.mark.parametrize("fields", [
    {"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]}, {"target_modules": ["q_proj"]},
], ids=["input lora", "output lora", "input trained", "rows trained", "untouched"])
def test_tied_embeddings_stay_right(run, fields, tmp_path, converse):
    tied = tiny.save_decoder(tmp_path / "tied", tie_word_embeddings=True)
    folder = run("converse", model={**converse["model"], "name_or_path": tied}, adapter={
        "method": "lora", "r": 4, **fields})
    merged, record = exported(folder, "--merge")
    assert record["deviation"] <= 1e-4
    model = AutoModelForCausalLM.from_pretrained(merged)
    same = torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    assert same is model.config.tie_word_embeddings is (fields == {"target_modules": ["q_proj"]} or (
        "trainable_token_indices" in fields))


def test_an_existing_folder_is_never_written_over(run, capsys):
    folder = run("classify")
    (folder.parent / "here").mkdir()
    (folder.parent / "here" / "mine.txt").write_text("mine")
    assert code("export", folder, "--to", folder.parent / "here") == 2
    assert [path.name for path in (folder.parent / "here").iterdir()] == ["mine.txt"]
    assert "nothing is written over" in capsys.readouterr().err


def test_a_learned_prompt_is_not_merged_but_exported_as_it_is(run, capsys):
    folder = run("converse", adapter={"method": "prompt_tuning", "num_virtual_tokens": 4})
    assert code("export", folder, "--to", folder.parent / "no", "--merge") == 2
    assert "without --merge" in capsys.readouterr().err and nothing_left(folder.parent / "no")
    assert exported(folder)[1]["deviation"] == 0.0


@pytest.mark.parametrize(("options", "said"), [
    (["--merge", "--gguf"], "llama.cpp"), (["--gguf"], "add --merge"), (["--dtype", "float16"], "add --merge"),
    (["--into", "original"], "add --merge"), (["--merge", "--gguf", "--llama-cpp", "/nowhere"], "convert_hf_to_gguf"),
    (["--merge", "--max-shard-size", "lots"], "a number of KB, MB, GB or TB"),
])
def test_what_cannot_be_exported_is_said_with_the_mend(run, monkeypatch, capsys, options, said):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    folder = run("converse")
    assert code("export", folder, "--to", folder.parent / "no", *options) == 2
    assert said in capsys.readouterr().err and nothing_left(folder.parent / "no")


@pytest.mark.slow
def test_a_bare_folder_is_compared_on_random_tokens_and_json_is_one_object(run, command):
    folder = run("converse")
    moved = folder.parent / "elsewhere"
    (folder / "final").rename(moved)
    done = command("-m", "peftune.cli", "export", moved, "--to", folder.parent / "out", "--merge", "--json")
    record = json.loads(done.stdout)  # of a new process: some libraries log to standard output when imported
    assert record["rows"]["held_out"] is False and record["deviation"] <= 1e-4 and record["published"]


def test_the_card_has_scores_with_intervals_data_and_what_was_compared(run):
    card = (exported(run("classify"), "--merge")[0] / "README.md").read_text()
    assert "init_from" not in card and "None" not in card
    assert "| accuracy |" in card and "95 % interval" in card and "validation.jsonl" in card
    assert "pipeline_tag: text-classification" in card and "tolerance" in card


def test_merging_into_the_original_weights_says_so_and_how_far_they_are_from_the_training(run, converse):
    folder = run("converse", model={**converse["model"], "dtype": "bfloat16"})  # of a float32 checkpoint
    _, record = exported(folder, "--merge", "--into", "original")
    assert record["dtype"] == "float32" and "checkpoint" in record["merged_into"]
    assert record["deviation"] <= 1e-4 < record["distance_from_training_precision"]


@pytest.mark.parametrize("method", mostly_slow(
    ["dora", "pissa", "adalora", "vera", "ia3", "oft", "miss", "ln_tuning"], "pissa"))
def test_methods_other_than_lora_merge_to_the_same_logits(run, method):
    assert exported(run("converse", steps=12, adapter=METHODS[method]), "--merge")[1]["deviation"] <= 1e-4


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_added_tokens_merge_with_their_rows(run, converse, tmp_path, tie):
    base = tiny.save_decoder(tmp_path / "base", tie_word_embeddings=tie)
    folder = run("converse", model={**converse["model"], "name_or_path": base, "added_tokens": ["<plan>", "<done>"]})
    merged, record = exported(folder, "--merge")
    assert record["deviation"] <= 1e-4
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == vocabulary(base) + 2
    assert model.config.tie_word_embeddings is tie


def vocabulary(base: str) -> int:
    return json.loads((Path(base) / "config.json").read_text())["vocab_size"]
