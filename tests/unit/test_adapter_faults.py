"""Faults of the adapter section: each is said once, by its key, before anything is trained."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from peftune.cli import main
from peftune.config.schema import AdapterConfig
from peftune.errors import ConfigError, ModelError, guarded
from peftune.model.adapters import attach, peft_config
from peftune.train import main as train
from tests.conftest import write_config
from tests.unit.test_methods import METHODS


@pytest.mark.parametrize(("fields", "said"), [
    ({"method": "poly"}, "the number of a task"),
    ({"method": "xlora"}, "trained already"),
    ({"inference_mode": True}, "nothing would train"),
    ({"peft_type": "IA3"}, "adapter.method names the method"),
    ({"task_type": "CAUSAL_LM"}, "adapter.task_type: task says it"),
    ({"r": 0}, "adapter.r: a rank is a whole number"),
    ({"r": "8"}, "adapter.r: a rank is a whole number"),
    ({"r": True}, "adapter.r: a rank is a whole number"),
    ({"alora_invocation_tokens": []}, "a list of their ids"),
    ({"alora_invocation_tokens": "foo"}, "a list of their ids"),
    ({"alora_invocation_tokens": ["foo"]}, "a list of their ids"),
    ({"method": "prompt_tuning"}, "the length of the prompt"),
    ({"method": "prefix_tuning", "num_virtual_tokens": "8"}, "the length of the prompt"),
])
def test_a_field_that_no_run_can_train_with_is_refused_by_its_key(fields, said):
    with pytest.raises(ConfigError, match=said) as caught:
        peft_config(AdapterConfig(**fields), "causal_lm", ())
    assert len(caught.value.faults) == 1 and caught.value.faults[0].mend


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_for_a_layer_that_is_not_adapted_is_refused(field, decoder):
    def attached(pattern):
        model = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32)
        return attach(model, peft_config(AdapterConfig(target_modules=["q_proj"], **{field: pattern}), "causal_lm", ()))

    attached({"q_proj": 4, "layers.0.self_attn.q_proj": 8})
    with pytest.raises(ModelError, match=f"adapter.{field}: 'v_proj' matches no layer") as caught:
        attached({"q_proj": 4, "v_proj": 4})
    assert "self_attn.q_proj" in caught.value.faults[0].mend


@pytest.mark.parametrize("command", ["check", "plan"])
@pytest.mark.parametrize(("fields", "said"), [
    ({"target_modules": ["nope"]}, "Target modules {'nope'} not found"),
    ({"rank_pattern": {"nope": 4}}, "adapter.rank_pattern: 'nope' matches no layer"),
    ({"target_modules": ["q_proj", "nope"]}, "adapter.target_modules: no module is called 'nope'"),
    ({"target_modules": "q_proj"}, "mend: [q_proj], as a list: a text is a pattern of whole names"),
    ({"modules_to_save": ["lm_head", "nope"]}, "adapter.modules_to_save: no module is called 'nope'"),
    ({"r": 0}, "adapter.r: a rank is a whole number"),
    ({"method": "loha", "target_modules": ["embed_tokens"]}, "adapter.method = loha does not fit"),
])
def test_check_and_plan_say_what_training_would_refuse(command, fields, said, converse, tmp_path, capsys):
    config = write_config({**converse, "adapter": {"method": "lora", **fields}}, tmp_path / "config")
    assert guarded(main, [command, str(config)]) == 2
    told = capsys.readouterr()
    assert said in " ".join((told.out + told.err).split()) and "measures it" not in told.out + told.err
    assert guarded(train, [str(config)]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", METHODS)
def test_check_has_nothing_against_a_method_that_trains(name, converse, tmp_path, capsys):
    config = write_config({**converse, "adapter": METHODS[name]}, tmp_path / "config")
    assert main(["check", str(config)]) == 0, capsys.readouterr().out
