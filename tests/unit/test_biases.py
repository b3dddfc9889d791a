"""Biases of the base that train beside an adapter are in the saved folder, and come back in plain peft."""

import pytest

from peftune.config.schema import AdapterConfig
from peftune.errors import ConfigError
from peftune.model.adapters import peft_config
from tests.conftest import metric_rows, summary
from tests.unit.test_methods import TOLERANCE, in_plain_peft, logits, trained

BIASED = {
    "lora-all": {"method": "lora", "r": 4, "bias": "all"},
    "lora-only": {"method": "lora", "r": 4, "bias": "lora_only"},
    "oft": {"method": "oft", "r": 0, "oft_block_size": 8, "target_modules": "all-linear", "bias": "oft_only"},
    "miss": {"method": "miss", "r": 4, "target_modules": "all-linear", "bias": "all"},
}


@pytest.mark.parametrize("name", BIASED)
def test_biases_that_train_beside_an_adapter_are_saved_with_it(name, classify, tmp_path):
    settings = {**classify, "adapter": BIASED[name]}
    settings["train"] = {**settings["train"], "learning_rate": 0.02}
    run, said, inputs, live = trained(settings, tmp_path)
    biases = [name for name, tensor in run.model.named_parameters() if name.endswith("bias") and tensor.requires_grad]
    assert any(".bert." in name for name in biases)
    assert said["reload_deviation"] <= TOLERANCE
    attached = in_plain_peft(settings, run.folder / "final")
    assert (logits(attached, inputs) - live).abs().max() <= TOLERANCE
    assert (logits(attached.merge_and_unload(), inputs) - live).abs().max() <= TOLERANCE * max(1, live.abs().max())


def test_the_best_weights_of_a_run_with_biases_are_scored_too(classify, train):
    folder = train({**classify, "adapter": BIASED["lora-all"]}, "train.learning_rate=0.5", "evaluation.every_steps=1")
    assert summary(folder)["best_step"] in {row["step"] for row in metric_rows(folder, "validation")}


@pytest.mark.parametrize(("task", "fields", "said"), [
    ("causal_lm", {"init_lora_weights": "pissa"}, "takes no second adapter"),
    ("causal_lm", {"stack_on": "x"}, "takes no second adapter"),
    ("preference", {}, "would keep the trained biases"),
])
def test_biases_of_the_base_are_refused_where_another_model_needs_it_as_it_was(task, fields, said):
    with pytest.raises(ConfigError, match=f"adapter.bias: .*{said}"):
        peft_config(AdapterConfig(bias="all", **fields), task, ())
