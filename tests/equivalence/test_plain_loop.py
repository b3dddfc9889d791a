"""A whole run, from rows to saved weights, is a plain loop of torch that knows nothing of peftune.

The loop reads one unpadded row at a time and takes one step over all of them; the run packs or pads them in several
micro-batches. Float32: they differ by the order of sums alone, 1e-7 of a loss, which optimizers carry into weights.
"""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests import tiny
from tests.conftest import metric_rows

STEPS, WARMUP, RATE, DECAY, CLIP = 5, 2, 2e-3, 0.1, 0.8
CLASSES = ("complaint", "praise")


def rates():
    """A linear rise over two of five steps, then half a cosine."""
    done = [(step - WARMUP) / (STEPS - WARMUP) for step in range(STEPS)]
    return [RATE * ((step + 1) / WARMUP if step < WARMUP else (1 + math.cos(math.pi * p)) / 2)
            for step, p in enumerate(done)]


def plain_loop(model, loss_of, make_optimizer, faster=1.0):
    """Losses and gradient norms of each step; the model holds the trained weights. `faster`: of LoRA's matrices B."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer([{"params": [p], "lr": 0.0, "weight_decay": DECAY if p.ndim > 1 else 0.0,
                                 "times": faster if "lora_B" in name else 1.0} for name, p in trained.items()])
    model.eval()
    said = []
    for rate in rates():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["times"]
        optimizer.step()
        said.append((loss.item(), norm.item()))
    return said


def log_probability(model, prompt, answer):
    """Of the answer behind the prompt, in nats."""
    nats = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    at = torch.arange(len(prompt), len(prompt) + len(answer))
    return nats[at - 1, torch.tensor(answer)].sum()


def ids_of(tokenizer, row, key):
    """Of the prompt, and of what is written behind it with its end."""
    return (tokenizer(row["prompt"], add_special_tokens=False)["input_ids"],
            [*tokenizer(row[key], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])


def agree(folder, said, state):
    trained = [(row["loss"], row["grad_norm"]) for row in metric_rows(folder, "train")]
    assert [loss for loss, _ in trained] == pytest.approx([loss for loss, _ in said], rel=1e-5)
    assert [norm for _, norm in trained] == pytest.approx([norm for _, norm in said], rel=1e-4)
    [saved] = [load_file(path) for path in Path(folder, "final").glob("*model.safetensors")]
    assert saved.keys() <= state.keys() and len(saved) >= 8
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-5, msg=name)


def settings_of(base, rows, write_rows, **train):
    return {**base, "data": {"train": write_rows("rows.jsonl", rows), "validation": None, "max_length": 128},
            "evaluation": {"max_new_tokens": 0},
            "train": {"batch_size": len(rows), "max_steps": STEPS, "learning_rate": RATE, "warmup_ratio": 0.4,
                      "weight_decay": DECAY, "max_grad_norm": CLIP, "tokens_per_micro_batch": 90, **train}}


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_completions_with_lora_plus_train_as_in_a_plain_loop(layout, converse, decoder, write_rows, train, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in tiny.preference_rows(9)]
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    parts = [ids_of(tokenizer, row, "completion") for row in rows]
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(decoder), LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    model.save_pretrained(tmp_path / "start")
    settings = settings_of({**converse, "adapter": {"init_from": str(tmp_path / "start")}}, rows, write_rows,
                           lora_plus_ratio=4)
    folder = train(settings, f"data.layout={layout}")
    targets = sum(len(answer) for _, answer in parts)
    said = plain_loop(model, lambda m: -sum(log_probability(m, *part) for part in parts) / targets,
                      torch.optim.AdamW, faster=4.0)
    agree(folder, said, get_peft_model_state_dict(model))
    assert metric_rows(folder, "train")[-1]["supervised_tokens"] == STEPS * targets


def test_preferences_train_as_in_a_plain_loop(prefer, decoder, write_rows, train):
    rows, beta = tiny.preference_rows(7), 0.3
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    pairs = [[ids_of(tokenizer, row, key) for key in ("chosen", "rejected")] for row in rows]
    model = AutoModelForCausalLM.from_pretrained(decoder)
    reference = copy.deepcopy(model).eval().requires_grad_(False)

    def loss_of(model):
        gains = [[log_probability(model, *part) - log_probability(reference, *part) for part in pair]
                 for pair in pairs]
        return -sum(F.logsigmoid(beta * (chosen - rejected)) for chosen, rejected in gains) / len(gains)

    folder = train(settings_of({**prefer, "adapter": None}, rows, write_rows, dpo_beta=beta, optimizer="sgd"))
    said = plain_loop(model, loss_of, lambda groups: torch.optim.SGD(groups, momentum=0.9))
    agree(folder, said, model.state_dict())


def test_classes_train_as_in_a_plain_loop(classify, encoder, write_rows, train, tmp_path):
    rows = tiny.intent_rows(11)
    torch.manual_seed(2)
    names = dict(enumerate(CLASSES))
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    for saved in (tokenizer, AutoModelForSequenceClassification.from_pretrained(
            encoder, id2label=names, label2id={name: number for number, name in names.items()})):
        saved.save_pretrained(tmp_path / "with-head")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "with-head")
    inputs = [tokenizer(row["text"], truncation=True, max_length=128, return_tensors="pt") for row in rows]
    wanted = torch.tensor([CLASSES.index(row["label"]) for row in rows])

    def loss_of(model):
        return F.cross_entropy(torch.cat([model(**row).logits for row in inputs]), wanted)

    base = {**classify, "adapter": None, "model": {"name_or_path": str(tmp_path / "with-head"), "dtype": "float32"}}
    folder = train(settings_of(base, rows, write_rows, optimizer="sgd"))
    said = plain_loop(model, loss_of, lambda groups: torch.optim.SGD(groups, momentum=0.9))
    agree(folder, said, model.state_dict())
