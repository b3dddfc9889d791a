"""Models, heads and adapters: what trains, what is saved, what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from peftune.config.schema import AdapterConfig, EvaluationConfig, ModelConfig, TrainConfig
from peftune.errors import ConfigError, MachineError, ModelError
from peftune.model.adapters import peft_config
from peftune.model.assemble import assemble, count
from peftune.model.load import adjust_config, longest_input
from peftune.model.resolve import load_tokenizer, resolve
from peftune.tasks import TASKS


def assembled(path, task, adapter, names=("a", "b"), **model):
    section = ModelConfig(name_or_path=path, **model)
    tokenizer = load_tokenizer(section, path, generates=False)
    problem = "next_token" if task == "causal_lm" else "single_label"
    config = adjust_config(AutoConfig.from_pretrained(path), dropout=0.0, problem=problem, names=names,
                           pad_id=tokenizer.pad_token_id)
    return assemble(section, adapter, path, config, TASKS[task](TrainConfig(), EvaluationConfig()).auto_class,
                    task=task, new_head=task != "causal_lm", seed=0)


def test_the_new_head_trains_beside_the_adapter_and_nothing_else_does(encoder):
    model, loaded = assembled(encoder, "sequence_classification", AdapterConfig(r=2))
    assert loaded.new_modules == ("classifier",)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "classifier" in name for name in trained)
    assert any("classifier" in name for name in trained)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_trainable_weights_are_float32_and_frozen_ones_as_asked(decoder, dtype):
    model, _ = assembled(decoder, "causal_lm", AdapterConfig(r=2), dtype=dtype)
    types = {p.requires_grad: p.dtype for p in model.parameters()}
    assert types == {True: torch.float32, False: getattr(torch, dtype)}


def test_full_fine_tuning_keeps_float32_weights_unless_pure_bf16_is_asked(decoder):
    assert {p.dtype for p in assembled(decoder, "causal_lm", None)[0].parameters()} == {torch.float32}
    assert {p.dtype for p in assembled(decoder, "causal_lm", None, pure_bf16=True)[0].parameters()} == {torch.bfloat16}


def test_new_weights_depend_on_the_seed_alone(encoder):
    first, second = (assembled(encoder, "sequence_classification", AdapterConfig(r=2))[0] for _ in range(2))
    assert all((a == b).all() for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_dropout_of_the_model_is_off_by_default(encoder):
    model, _ = assembled(encoder, "sequence_classification", None)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


@pytest.mark.parametrize("fields", [
    {"method": "ia3", "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    {"method": "vera", "r": 8, "target_modules": ["q_proj", "v_proj"]},
    {"method": "oft", "oft_block_size": 8, "r": 0, "target_modules": ["q_proj"]},
    {"method": "lora", "use_dora": True, "r": 4}, {"method": "prompt_tuning", "num_virtual_tokens": 4},
], ids=lambda fields: fields["method"])
def test_peft_methods_take_their_own_fields(decoder, fields):
    model, _ = assembled(decoder, "causal_lm", AdapterConfig(**fields), dtype="float32")
    counted = count(model)
    assert 0 < counted.trainable < counted.total


@pytest.mark.parametrize(("fields", "said"), [
    ({"method": "lora", "lora_alhpa": 3}, "lora_alpha"), ({"method": "loraa"}, "lora"),
    ({"method": "ia3", "r": 3}, "IA3Config"),
])
def test_a_wrong_adapter_field_or_method_says_the_right_one(fields, said):
    with pytest.raises(ConfigError, match=said):
        peft_config(AdapterConfig(**fields), "causal_lm", ())


def test_a_missing_body_weight_is_refused(decoder, tmp_path):
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(decoder, tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights.*up_proj"):
        assembled(str(tmp_path / "m"), "causal_lm", None)


def test_a_head_of_another_size_is_made_new(encoder, train, classify):
    folder = train({**classify, "adapter": None})
    model, loaded = assembled(str(folder / "final"), "sequence_classification", None, names=("a", "b", "c"))
    assert loaded.new_modules == ("classifier",) and model.classifier.out_features == 3


@pytest.fixture
def trained_head(encoder, tmp_path):
    """A classifier's folder with the classes a and b, and a head that no start draws."""
    model, _ = assembled(encoder, "sequence_classification", None)
    torch.nn.init.constant_(model.classifier.weight, 3.0)
    model.save_pretrained(tmp_path / "head")
    load_tokenizer(ModelConfig(name_or_path=encoder), encoder, generates=False).save_pretrained(tmp_path / "head")
    return tmp_path / "head"


@pytest.mark.parametrize("adapter", [None, AdapterConfig(r=2)], ids=["full", "lora"])
def test_a_trained_head_is_kept_for_its_classes_in_their_order_and_refused_in_another(trained_head, adapter):
    model, loaded = assembled(str(trained_head), "sequence_classification", adapter)
    kept = [p for name, p in model.named_parameters() if "classifier" in name and name.endswith("weight")]
    assert loaded.new_modules == () and all((p == 3.0).all() and p.requires_grad for p in kept[-1:])
    with pytest.raises(ModelError, match=r"the classes \['a', 'b'\], not \['b', 'a'\]") as refused:
        assembled(str(trained_head), "sequence_classification", adapter, names=("b", "a"))
    assert refused.value.faults[0].mend.startswith('data.labels=["a", "b"]')


def test_a_head_of_as_many_other_classes_is_made_new(trained_head):
    model, loaded = assembled(str(trained_head), "sequence_classification", None, names=("a", "c"))
    assert loaded.new_modules == ("classifier",)
    assert 0 < model.classifier.weight.abs().max() < 0.2 and (model.classifier.bias == 0).all()


def test_a_head_whose_classes_have_no_names_is_kept(trained_head):
    config = json.loads((trained_head / "config.json").read_text())
    config |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    (trained_head / "config.json").write_text(json.dumps(config))
    model, loaded = assembled(str(trained_head), "sequence_classification", None, names=("c", "d"))
    assert loaded.new_modules == () and (model.classifier.weight == 3.0).all()


def test_saved_classifiers_carry_their_class_names(train, classify):
    folder = train(classify)
    config = json.loads((folder / "final" / "config.json").read_text())
    assert config["id2label"] == {"0": "complaint", "1": "praise"}
    assert config["architectures"] == ["BertForSequenceClassification"]


@pytest.mark.parametrize(("name", "error", "said"), [
    ("package:no_such_package/model", MachineError, "no package"), ("package:json/nothing", ModelError, "config.json"),
    ("./nowhere", ModelError, "no such folder"), ("a/b/c", ModelError, "no such folder"),
    ("bad name!", ModelError, "valid hub id"),
])
def test_a_model_that_cannot_be_had_is_said(name, error, said):
    with pytest.raises(error, match=said):
        resolve(ModelConfig(name_or_path=name))


def test_a_position_table_limits_the_length_and_rotary_positions_do_not(encoder, decoder):
    assert longest_input(AutoConfig.from_pretrained(encoder), 512) == 128
    assert longest_input(AutoConfig.from_pretrained(decoder), 512) == 512


@pytest.mark.slow
def test_multi_label_and_regression_runs_learn(classify, train, tmp_path):
    from tests import tiny
    from tests.conftest import summary

    for name, label in (("multi", lambda row: [row["label"], "long"] if len(row["text"]) > 80 else [row["label"]]),
                        ("regression", lambda row: 1.5 if row["label"] == "praise" else -0.5)):
        rows = [{"text": row["text"], "label": label(row)} for row in tiny.intent_rows(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        folder = train({**classify, "data": {"train": str(tmp_path / f"{name}.jsonl"), "validation": 0.2},
                        "train": {**classify["train"], "max_steps": 40, "learning_rate": 0.01},
                        "evaluation": {"every_steps": 5, "metric": "loss"}}, name=f"run-{name}")
        result = summary(folder)
        assert result["best"]["validation"]["loss"] < result["baseline"]["validation"]["loss"], name
