"""Pairs, the reference, and what DPO makes of them."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftune.config.schema import DataConfig, TrainConfig
from peftune.data.layouts import lay_out
from peftune.data.preferences import preference_fields
from peftune.data.rows import Row
from peftune.data.targets import RowFault, Targets
from peftune.model.next_token import end_in_losses
from peftune.model.reference import frozen_copy, reference_of
from peftune.numerics.losses import IGNORE
from peftune.tasks.preference import encode, preference
from peftune.tasks.task import TextEncoder
from tests.conftest import metric_rows, mostly_slow, summary

TARGETS = Targets("preference", kind="pair")


def encoded(tokenizer, fields, max_length=200):
    (example,) = encode(Row(fields, "f", 1, "0"), TARGETS, TextEncoder(tokenizer, max_length, DataConfig(train="x")))
    return example


def test_a_pair_holds_the_prompt_twice_and_learns_the_answers_only(decoder):
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    example = encoded(tokenizer, {"prompt": "the printer", "chosen": " works", "rejected": " is broken"})
    parts = [(list(example.input_ids)[at], list(example.targets)[at])
             for at in (slice(0, example.first_part), slice(example.first_part, None))]
    assert [tokenizer.decode(ids) for ids, _ in parts] == ["the printer works</s>", "the printer is broken</s>"]
    assert [tokenizer.decode([t for t in targets if t != IGNORE]) for _, targets in parts] == [
        " works</s>", " is broken</s>"]
    assert example.num_targets == 1


def test_a_pair_whose_prompt_fills_the_limit_has_no_target(decoder):
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    fields = {"prompt": "the printer " * 9, "chosen": "a", "rejected": "b"}
    assert encoded(tokenizer, fields, max_length=4).num_targets == 0


def test_a_prompt_may_be_empty(decoder):
    example = encoded(AutoTokenizer.from_pretrained(decoder), {"prompt": "", "chosen": "a", "rejected": "b"})
    assert example.record["prompt"] == "" and example.num_targets == 1


TURN = {"role": "user", "content": "q"}


@pytest.mark.parametrize("values", [
    {"prompt": [TURN], "chosen": "a", "rejected": "b"},
    {"prompt": "q", "chosen": [{"role": "assistant", "content": "a"}],
     "rejected": [{"role": "assistant", "content": "b"}]},
    {"chosen": [TURN, {"role": "assistant", "content": "a"}],
     "rejected": [TURN, {"role": "assistant", "content": "b"}]},
    {"prompt": [TURN], "chosen": [TURN, {"role": "assistant", "content": "a"}],
     "rejected": [TURN, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
     "rejected": {"from": "gpt", "value": "b"}},
    {"messages": [TURN], "chosen": {"role": "assistant", "content": "a"},
     "rejected": {"role": "assistant", "content": "b"}},
    {"conversations": [TURN], "chosen": "a", "rejected": "b"},
    {"prompt": "User: q", "chosen": [TURN, {"role": "assistant", "content": "a"}],
     "rejected": [TURN, {"role": "assistant", "content": "b"}]},
])
def test_preference_rows_come_in_several_shapes(values):
    assert preference_fields(values) == {"messages": [TURN], "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(("prompt", "whole"), [
    ([{"role": "system", "content": "s"}], ["system", "user"]),
    ([{"role": "system", "content": "s"}, TURN], ["system", "user"]),
    ([{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}], ["user", "assistant", "user"]),
])
def test_turns_that_the_prompt_and_the_conversations_share_are_there_once(prompt, whole):
    sides = {key: [TURN, {"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    assert [turn["role"] for turn in preference_fields({"prompt": prompt, **sides})["messages"]] == whole


@pytest.mark.parametrize("prompt", ["another", 3, [{"role": "user", "content": "another"}]])
def test_a_prompt_that_the_conversations_contradict_is_a_row_fault(prompt):
    sides = {key: [TURN, {"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    with pytest.raises(RowFault, match="prompt is"):
        preference_fields({"prompt": prompt, **sides})


@pytest.mark.parametrize("values", [
    {"prompt": "q", "chosen": "a"}, {"prompt": "q", "chosen": "a", "rejected": " a "}, {"chosen": "a", "rejected": "b"},
    {"prompt": "q", "chosen": "", "rejected": "b"}, {"prompt": 3, "chosen": "a", "rejected": "b"},
    {"chosen": [TURN], "rejected": [TURN]},
    {"chosen": [TURN, TURN], "rejected": [{"role": "user", "content": "x"}, TURN]},
])
def test_a_row_that_is_no_pair_is_a_fault(values):
    with pytest.raises(RowFault) as caught:
        preference_fields(values)
    assert caught.value.mend


def test_log_probabilities_are_the_naive_ones_and_the_reference_keeps_its_weights(decoder):
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    model = AutoModelForCausalLM.from_pretrained(decoder).double().eval()
    end_in_losses(model)
    example = encoded(tokenizer, {"prompt": "the printer", "chosen": " works again", "rejected": " was lost"})
    batch = lay_out([example], [0], pad_id=1, kind="pair", width=0, device=torch.device("cpu"))
    task, reference = preference(TrainConfig(dpo_beta=0.5)), reference_of(frozen_copy(model, torch.float64))
    with torch.no_grad():
        naive = []
        for at in (slice(0, example.first_part), slice(example.first_part, None)):
            ids, targets = list(example.input_ids)[at], list(example.targets)[at]
            logp = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
            naive.append(sum(logp[i - 1, t] for i, t in enumerate(targets) if t != IGNORE).item())
        before = task.forward(model, batch, reference)
        assert before.tolist()[0] == pytest.approx([*naive, *naive], rel=1e-9)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        after = task.forward(model, batch, reference)
    assert after[0, 2:].tolist() == before[0, 2:].tolist() and after[0, 0] != before[0, 0]
    chosen, rejected, chosen_reference, rejected_reference = after[0].tolist()
    margin = 0.5 * ((chosen - rejected) - (chosen_reference - rejected_reference))
    assert task.losses(after, batch, TARGETS).item() == pytest.approx(math.log(1 + math.exp(-margin)))
    (record,) = task.predictions(after, batch, TARGETS, [{}])
    assert record["margin"] == pytest.approx(margin)
    assert record["chosen_reward"] - record["rejected_reward"] == pytest.approx(margin)


@pytest.mark.parametrize("adapter", [{"method": "lora", "r": 4}, None], ids=["lora", "full"])
@pytest.mark.parametrize("layout", mostly_slow(["padded", "packed"], "packed"))
def test_training_begins_at_ln_2_and_learns_to_prefer_the_chosen_answers(adapter, layout, prefer, train):
    settings = {**prefer, "adapter": adapter, "train": {"batch_size": 8, "max_steps": 30, "learning_rate": 0.005}}
    folder = train(settings, f"data.layout={layout}")
    result = summary(folder)
    assert metric_rows(folder, "train")[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    before, after = result["baseline"]["validation"], result["metrics"]["validation"]
    assert before["loss"] == pytest.approx(math.log(2), rel=1e-5) and before["margin"] == 0
    assert before["accuracy"] == 0.5, "pairs that nothing tells apart count one half, as a coin would"
    assert after["accuracy"] > 0.8 and after["margin"] > 0.1 and after["loss"] < before["loss"]
    records = [json.loads(line) for line in (folder / "predictions" / "validation.jsonl").read_text().splitlines()]
    assert after["accuracy"] == sum(record["prediction"] == "chosen" for record in records) / len(records)


def test_in_bfloat16_too_the_reference_is_the_model_that_has_not_trained(prefer, train):
    """Matrices of the copy are rounded as products round them; anything else would make margins out of nothing."""
    folder = train({**prefer, "adapter": None, "model": {**prefer["model"], "dtype": "bfloat16"}}, "train.max_steps=1")
    assert metric_rows(folder, "train")[0]["loss"] == pytest.approx(math.log(2), rel=1e-7)
    before = summary(folder)["baseline"]["validation"]
    assert before["margin"] == 0 and before["chosen_reward"] == 0
