"""Every first-class PEFT method: it learns, and what it leaves is the trained model to plain peft, merged or not."""


import functools
from contextlib import nullcontext

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftune.build import build
from peftune.config.load import load
from peftune.config.schema import AdapterConfig
from peftune.data.layouts import lay_out
from peftune.errors import ConfigError, PeftuneError
from peftune.loop.finish import finish
from peftune.loop.fit import fit
from peftune.loop.generate import generate_texts
from peftune.model.adalora import RankBudget
from peftune.model.adapters import attach, peft_config
from tests.conftest import metric_rows, mostly_slow, write_config

TOLERANCE = 1e-4

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
    "frod": {"method": "frod", "target_modules": ["q_proj", "v_proj"]},
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


@pytest.mark.parametrize(("method", "task"), mostly_slow(CASES, ("lora", "converse"), ("prefix_tuning", "classify")),
                         ids=lambda value: value)
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
    assert (logits(attached.merge_and_unload(), inputs) - live).abs().max() <= TOLERANCE * max(1, live.abs().max())


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.slow
def test_what_a_learned_prompt_generates_does_not_depend_on_the_other_prompts(method, converse, tmp_path):
    settings = {**converse, "adapter": METHODS[method]}
    settings["train"] = {**settings["train"], "max_steps": 24, "learning_rate": 0.05}
    run, *_ = trained(settings, tmp_path)
    prompts = {i: list(range(5 + 3 * i, 12 + 5 * i)) for i in range(6)}
    say = functools.partial(generate_texts, run.model.eval(), run.evaluator.tokenizer, max_new_tokens=12,
                            device=torch.device("cpu"), autocast=nullcontext)
    together, alone = say(prompts), [say({i: prompts[i]})[i] for i in prompts]
    assert [together[i] for i in prompts] == alone


def short(settings, **train):
    return {**settings, "train": {**settings["train"], "max_steps": 8, "learning_rate": 0.01, **train}}


def first_state(settings, tmp_path, name="first", *overrides):
    """A run that is built and takes no step: its model, and its logits for the validation rows."""
    path = write_config({**settings, "output_dir": str(tmp_path / name)}, tmp_path / f"config-{name}")
    with build(load([str(path), *overrides])) as built:
        return built.run, run_logits(built.run)


def run_logits(run):
    examples = [run.data.splits["validation"][i] for i in range(4)]
    inputs = lay_out(examples, range(4), pad_id=run.evaluator.tokenizer.pad_token_id, kind=run.data.targets.kind,
                     width=run.data.targets.width, device=torch.device("cpu")).inputs
    return run.live_logits(run.model, inputs)


@pytest.mark.parametrize(("method", "task"), mostly_slow([
    ("lora", "classify"), ("pissa", "converse"), ("adalora", "converse"), ("vera", "converse"),
    ("prefix projection", "classify"), ("token rows", "converse")], ("lora", "classify")), ids=lambda value: value)
def test_a_run_that_continues_an_adapter_begins_with_its_logits(method, task, request, tmp_path):
    settings = short({**request.getfixturevalue(task), "adapter": METHODS[method]}, max_steps=10)
    run, _, _, live = trained(settings, tmp_path)
    further = {**settings, "adapter": {"method": METHODS[method]["method"], "init_from": str(run.folder)}}
    again, begun = first_state(further, tmp_path)
    assert torch.allclose(begun, live, atol=TOLERANCE, rtol=0)
    assert {name for name, p in again.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("changes", "said"), [
    ({"r": 8}, "adapter.r = 8, but"), ({"method": "ia3"}, "adapter.init_from holds lora"),
    ({"init_from": "nowhere"}, "no adapter lies there"),
])
def test_continuing_an_adapter_with_other_values_is_refused(changes, said, converse, tmp_path):
    run, *_ = trained(short({**converse, "adapter": LORA}), tmp_path)
    wrong = {"method": "lora", "init_from": str(run.folder), **changes}
    with pytest.raises(PeftuneError, match=said):
        first_state({**converse, "adapter": wrong}, tmp_path)


def test_a_head_is_not_continued_for_other_classes(classify, tmp_path):
    run, *_ = trained(short({**classify, "adapter": LORA}), tmp_path)
    other = {**classify, "adapter": {"init_from": str(run.folder)},
             "data": {**classify["data"], "labels": ["praise", "complaint"]}}
    with pytest.raises(PeftuneError, match="trained for the classes"):
        first_state(other, tmp_path)


def test_a_lora_beneath_another_stays_and_both_are_saved_as_one(converse, tmp_path):
    below = {**LORA, "target_modules": ["q_proj", "up_proj"], "use_rslora": True, "lora_alpha": 5}
    earlier, _, _, before = trained(short({**converse, "adapter": below}), tmp_path)
    above = {"method": "lora", "r": 2, "target_modules": ["v_proj", "up_proj"], "stack_on": str(earlier.folder)}
    settings = short({**converse, "adapter": above, "output_dir": str(tmp_path / "second")})
    _, begun = first_state(settings, tmp_path)
    assert torch.allclose(begun, before, atol=1e-5, rtol=0)
    run, summary, inputs, live = trained(settings, tmp_path)
    assert (live - before).abs().max() > 0.01 and summary["reload_deviation"] <= TOLERANCE
    joined = in_plain_peft(settings, run.folder / "final")
    assert (logits(joined, inputs) - live).abs().max() <= TOLERANCE
    assert (logits(joined.merge_and_unload(), inputs) - live).abs().max() <= TOLERANCE


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_from_factors_is_pissas_and_oloras_own_and_leaves_the_base_as_it_is(start, decoder):
    def config():
        return LoraConfig(r=4, init_lora_weights=start, target_modules="all-linear", task_type="CAUSAL_LM")

    ids = torch.arange(5, 25)[None]
    plain = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32), config())
    ours = attach(AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32), config())
    for model in (theirs, ours):
        model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    mine = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert gradients.keys() == mine.keys()
    assert all(torch.allclose(mine[name], gradients[name], atol=1e-5) for name in mine)
    with ours.disable_adapter(), torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_best_of_a_learned_prompt_with_a_network_is_put_back(converse, tmp_path):
    settings = short({**converse, "adapter": METHODS["p_tuning"]}, max_steps=6)
    settings["evaluation"] = {**settings["evaluation"], "every_steps": 3}
    run, *_ = trained(settings, tmp_path)
    weights = run.published_weights(run.model, run.folder / "final")
    live = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    assert weights.keys() == live.keys() and all(torch.equal(weights[name], live[name]) for name in live)


def test_activated_lora_begins_in_each_example_at_its_own_tokens(converse, decoder, write_rows, train):
    """PEFT looks for them in each row: of a packed one, it would adapt the last example alone."""
    rows = [{"prompt": f"question {number} answer:", "completion": f" the badge {number}"} for number in range(24)]
    tokens = AutoTokenizer.from_pretrained(decoder)("answer:", add_special_tokens=False)["input_ids"][1:]
    settings = short({**converse, "adapter": {**LORA, "alora_invocation_tokens": tokens}}, tokens_per_micro_batch=4096)
    settings["data"] = {"train": write_rows("asked.jsonl", rows), "validation": None}
    whole = train(settings, name="whole")
    apart = train(settings, "train.tokens_per_micro_batch=1", name="apart")
    losses = [[row["loss"] for row in metric_rows(folder, "train")] for folder in (whole, apart)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < 0.9 * losses[0][0]


@pytest.mark.slow
def test_the_matrices_b_learn_faster_by_the_ratio_of_lora_plus(converse, tmp_path):
    settings = short({**converse, "adapter": LORA}, lora_plus_ratio=16.0, lr_scheduler="constant", warmup_ratio=0.5)
    run, *_ = trained(settings, tmp_path)
    names = {id(p): name for name, p in run.model.named_parameters()}
    rates = {"lora_B" in names[id(p)]: group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert rates == {True: pytest.approx(0.16), False: pytest.approx(0.01)}
    plain, *_ = trained({**short({**converse, "adapter": LORA}), "output_dir": str(tmp_path / "plain")}, tmp_path)
    assert metric_rows(run.folder, "train")[-1]["learning_rate"] == pytest.approx(0.01)
    assert metric_rows(run.folder, "train")[-1]["loss"] != metric_rows(plain.folder, "train")[-1]["loss"]


@pytest.mark.slow
def test_adalora_keeps_its_budget_and_a_resumed_run_is_the_unbroken_one(converse, train, tmp_path):
    settings = short({**converse, "adapter": METHODS["adalora"]}, max_steps=20)
    settings["checkpoint"] = {"every_steps": 7, "keep": 9}
    whole = train(settings, name="whole")
    for step in (7, 14):
        part = train(settings, f"resume={whole}/checkpoints/step-{step:06d}", name=f"from-{step}")
        first, again = (load_file(folder / "final" / "adapter_model.safetensors") for folder in (whole, part))
        assert all(torch.equal(first[name], again[name]) for name in first)
    values = [tensor for name, tensor in first.items() if "lora_E" in name]
    assert sum(int((tensor != 0).sum()) for tensor in values) == 3 * len(values)  # target_r


def test_adalora_shares_out_as_peft_does_by_itself(decoder):
    """Twins: our hooks, and PEFT's own call after each step, on the same gradients without regularisation."""
    def fresh():
        torch.manual_seed(0)
        config = AdaLoraConfig(init_r=6, target_r=3, tinit=2, tfinal=3, deltaT=2, total_step=12, orth_reg_weight=0.0,
                               target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32), config)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)

    ours, my_optimizer = fresh()
    theirs, their_optimizer = fresh()
    RankBudget(ours, my_optimizer, steps=12, done=0)
    for step in range(12):
        ids = torch.randint(400, (2, 16), generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((ours, my_optimizer), (theirs, their_optimizer)):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            if model is theirs:
                model.base_model.update_and_allocate(step + 1)
            optimizer.zero_grad()
        for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(mine, other, atol=1e-6), (step, name)


def test_eva_starts_the_same_on_the_same_data_and_not_on_other(converse, tmp_path):
    settings = {**converse, "adapter": METHODS["eva"]}
    first, second, other = (first_state(settings, tmp_path, name, *more)[0].model for name, more in (
        ("a", []), ("b", []), ("c", ["seed=1"])))
    a, b, c = (torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_A" in name][:1])
               for model in (first, second, other))
    assert torch.equal(a, b) and not (a.shape == c.shape and torch.allclose(a, c))


def test_eva_says_which_layer_sees_too_few_rows(classify, tmp_path):
    settings = {**classify, "adapter": {**METHODS["eva"], "r": 16}}
    with pytest.raises(PeftuneError, match=r"looks for 32 directions.*pooler.dense sees at most 8 rows"):
        first_state(settings, tmp_path)


@pytest.mark.parametrize(("task", "fields", "said"), [
    ("token_classification", {"method": "prompt_tuning", "num_virtual_tokens": 4}, "moves the outputs of its tokens"),
    ("question_answering", {"method": "p_tuning", "num_virtual_tokens": 4}, "moves the outputs of its tokens"),
    ("sequence_classification", {"method": "trainable_tokens", "token_indices": [1]}, "cannot train an output layer"),
    ("causal_lm", {"method": "cpt"}, "ids of its own"),
    ("causal_lm", {"method": "adaption_prompt", "adapter_len": 4, "adapter_layers": 1}, "PEFT reads none back"),
    ("causal_lm", {"method": "adalora", "total_step": 10}, "the run knows its steps"),
    ("causal_lm", {"use_dora": True, "init_lora_weights": "pissa"}, "nothing can be added to it"),
    ("causal_lm", {"lora_bias": True, "init_lora_weights": "olora"}, "a bias of B"),
    ("causal_lm", {"init_lora_weights": "corda"}, "statistics"),
    ("causal_lm", {"init_lora_weights": "loftq", "use_dora": True}, "magnitudes are those of the rounded"),
    ("causal_lm", {"init_lora_weights": "loftq", "stack_on": "x"}, "their own start"),
    ("causal_lm", {"method": "adalora", "init_lora_weights": "loftq"}, "only LoRA starts"),
    ("preference", {"init_lora_weights": "loftq"}, "lack what was rounded away"),
    ("causal_lm", {"method": "ia3", "stack_on": "x"}, "only LoRA can be saved as one"),
    ("causal_lm", {"init_lora_weights": "pissa", "stack_on": "x"}, "their own start"),
    ("causal_lm", {"init_from": "y", "stack_on": "x"}, "trained on or laid beneath"),
    ("preference", {"init_from": "y"}, "without any adapter"),
])
def test_what_a_method_cannot_do_is_refused_before_anything_is_loaded(task, fields, said):
    with pytest.raises(ConfigError, match=said) as caught:
        peft_config(AdapterConfig(**fields), task, ())
    assert all(fault.mend for fault in caught.value.faults)


def test_a_method_without_token_rows_cannot_learn_added_tokens():
    with pytest.raises(ConfigError, match="rows of the embeddings"):
        peft_config(AdapterConfig(method="ia3"), "causal_lm", (), adds_tokens=True)
