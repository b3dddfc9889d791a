"""Every first-class PEFT method: it learns, and what it leaves is the trained model to plain peft, merged or not."""


import functools
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peftune.build import build
from peftune.config.load import load
from peftune.data.layouts import lay_out
from peftune.loop.finish import finish
from peftune.loop.fit import fit
from peftune.loop.generate import generate_texts
from tests.conftest import metric_rows, write_config

TOLERANCE = 1e-4
AUTO = {"causal_lm": AutoModelForCausalLM, "sequence_classification": AutoModelForSequenceClassification}

LORA = {"method": "lora", "r": 4}
METHODS = {
    "lora": LORA,
    "rslora": {**LORA, "use_rslora": True, "lora_dropout": 0.1},
    "dora": {**LORA, "use_dora": True},
    "lora+": {**LORA},
    "patterns": {**LORA, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 4, "layers.1.mlp.up_proj": 64}},
    "pissa": {**LORA, "init_lora_weights": "pissa"},
    "pissa-patterns": {**LORA, "init_lora_weights": "pissa_niter_4", "use_rslora": True, "lora_dropout": 0.1,
                       "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 4}},
    "olora": {**LORA, "init_lora_weights": "olora"},
    "eva": {**LORA, "init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    "adalora": {"method": "adalora", "init_r": 6, "target_r": 3, "tinit": 3, "tfinal": 5, "deltaT": 2,
                "lora_alpha": 32, "target_modules": "all-linear"},
    "vera": {"method": "vera", "r": 16, "target_modules": ["q_proj", "o_proj"]},
    "ia3": {"method": "ia3"},
    "oft": {"method": "oft", "r": 0, "oft_block_size": 8, "target_modules": "all-linear"},
    "miss": {"method": "miss", "r": 4, "target_modules": "all-linear"},
    "bone": {"method": "miss", "r": 4, "target_modules": "all-linear", "init_weights": "bat"},
    "ln_tuning": {"method": "ln_tuning"},
    "token rows": {**LORA, "trainable_token_indices": [5, 6, 7]},
    "prompt_tuning": {"method": "prompt_tuning", "num_virtual_tokens": 4},
    "p_tuning": {"method": "p_tuning", "num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "prefix_tuning": {"method": "prefix_tuning", "num_virtual_tokens": 4},
    "prefix projection": {"method": "prefix_tuning", "num_virtual_tokens": 4, "prefix_projection": True,
                          "encoder_hidden_size": 16},
}
ON_ENCODERS = ("lora", "pissa", "eva", "adalora", "ia3", "prompt_tuning", "p_tuning", "prefix_tuning",
               "prefix projection")
CASES = [(name, "converse") for name in METHODS] + [(name, "classify") for name in ON_ENCODERS]
PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning", "prefix projection")


def trained(settings, tmp_path):
    """Train; the run, its folder, some inputs, and the live model's logits for them."""
    with build(load([str(write_config(settings, tmp_path / "config"))])) as built:
        run = built.run
        _, summary = finish(run, fit(run, built.state))
        examples = [run.data.splits["validation"][i] for i in range(4)]
        inputs = lay_out(examples, range(4), pad_id=run.evaluator.tokenizer.pad_token_id, kind=run.data.targets.kind,
                         width=run.data.targets.width, device=torch.device("cpu")).inputs
        return run, summary, inputs, run.live_logits(run.model, inputs)


def in_plain_peft(settings, folder):
    """The published adapter on its base, as its model card says."""
    card = (folder / "README.md").read_text()
    lines = card.partition("```python\n")[2].partition("```")[0].replace("THIS_FOLDER", str(folder))
    names = {}
    exec(lines, names)  # what we tell users to do
    return names["model"].eval()


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs)["logits"]


@pytest.mark.parametrize(("method", "task"), CASES, ids=lambda value: value)
def test_a_method_learns_and_is_the_same_model_in_plain_peft_and_merged(method, task, request, tmp_path):
    settings = request.getfixturevalue(task)
    settings["adapter"] = METHODS[method]
    settings["train"] = {**settings["train"], "max_steps": 24, "learning_rate": 0.01}
    if method == "lora+":
        settings["train"]["lora_plus_ratio"] = 4.0
    if task == "classify":
        settings["train"]["max_steps"] = 40
    run, summary, inputs, live = trained(settings, tmp_path)
    rows = [row["loss"] for row in metric_rows(run.folder, "train")]
    assert sum(rows[-6:]) < sum(rows[:6])
    assert summary["reload_deviation"] <= TOLERANCE
    attached = in_plain_peft(settings, run.folder / "final")
    assert (logits(attached, inputs) - live).abs().max() <= TOLERANCE
    if method in PROMPTS:
        assert attached.active_peft_config.is_prompt_learning  # there is nothing to merge
        return
    assert (logits(attached.merge_and_unload(), inputs) - live).abs().max() <= TOLERANCE


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_what_a_learned_prompt_generates_does_not_depend_on_the_other_prompts(method, converse, tmp_path):
    settings = {**converse, "adapter": METHODS[method]}
    settings["train"] = {**settings["train"], "max_steps": 24, "learning_rate": 0.05}
    run, *_ = trained(settings, tmp_path)
    prompts = {i: list(range(5 + 3 * i, 12 + 5 * i)) for i in range(6)}
    say = functools.partial(generate_texts, run.model.eval(), run.evaluator.tokenizer, max_new_tokens=12,
                            device=torch.device("cpu"), autocast=nullcontext)
    together, alone = say(prompts), [say({i: prompts[i]})[i] for i in prompts]
    assert [together[i] for i in prompts] == alone
