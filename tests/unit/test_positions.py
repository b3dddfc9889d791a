"""Texts, learned prompts and answers share the positions that a model has learned."""

import json
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from peftune.cli import main
from peftune.loop.generate import _in_step, generate_texts
from peftune.model.load import longest_input
from tests.conftest import summary, write_config

POSITIONS = 64


@pytest.fixture(scope="session")
def learned_positions(decoder, tmp_path_factory):
    """Folder of a two-layer GPT-2 with 64 positions."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS, bos_token_id=0,
        eos_token_id=1, initializer_range=0.1)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def continued(converse, learned_positions, write_rows):
    """Settings of a short run whose prompts leave little room for an answer, and some of them none."""
    rows = [{"prompt": f"{number} " + "the printer " * (3 * number), "completion": " works again"}
            for number in range(20)]
    data = {"train": write_rows("long.jsonl", rows), "validation": write_rows("held.jsonl", rows[:12]),
            "max_length": 200}
    return {**converse, "model": {"name_or_path": learned_positions, "dtype": "float32"}, "data": data,
            "evaluation": {"max_new_tokens": 40}, "train": {**converse["train"], "max_steps": 2}}


def test_answers_end_where_the_model_has_no_further_position(continued, train, capsys):
    folder = train(continued)
    said = capsys.readouterr().out
    assert said.count("64 positions for text: prompts of more than 24 tokens get fewer than 40 new ones") == 1
    records = [json.loads(line) for line in (folder / "predictions" / "validation.jsonl").read_text().splitlines()]
    assert sum(record["prediction"] is not None for record in records) > 5
    assert summary(folder)["metrics"]["validation"]["rouge_l"] is not None


def _say(folder, prompts, max_new_tokens, **others):
    model, tokenizer = GPT2LMHeadModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    return generate_texts(model, tokenizer, prompts, max_new_tokens=max_new_tokens, device=torch.device("cpu"),
                          autocast=nullcontext, **others)


def test_what_a_prompt_near_the_end_is_given_does_not_depend_on_the_others(learned_positions):
    prompts = {length: list(range(5, 5 + length)) for length in (5, 20, 40, 41, 50, 50 + 13, 64, 90)}
    together = _say(learned_positions, prompts, 20)
    assert together == {key: _say(learned_positions, {key: prompt}, 20)[key] for key, prompt in prompts.items()}
    assert together[90] == _say(learned_positions, {0: prompts[90][-44:]}, 20)[0]


def test_a_warning_says_that_positions_end_and_only_then(learned_positions):
    warnings = []
    _say(learned_positions, {0: [5] * 44}, 20, warn=warnings.append)
    assert not warnings
    _say(learned_positions, {0: [5] * 45}, 20, warn=warnings.append)
    assert len(warnings) == 1 and "64 positions" in warnings[0]


def test_ranks_write_as_many_tokens_at_a_time():
    mine, theirs = [(20, [0]), (7, [1]), (3, [2])], [(20, [0]), (20, [1]), (5, [2]), (3, [3])]
    wanted = iter([20, 20, 7, 5, 3, 0])
    assert _in_step(mine, lambda room: next(wanted)) == [(20, [0]), (20, []), (7, [1]), (5, []), (3, [2])]
    wanted = iter([20, 20, 7, 5, 3, 0])
    assert _in_step(theirs, lambda room: next(wanted)) == [(20, [0]), (20, [1]), (7, []), (5, [2]), (3, [3])]


LONG = [{"text": f"ticket {number}: " + "the printer is broken and " * 40, "label": "ab"[number % 2]}
        for number in range(20)]
PROMPTS = [{"method": "prompt_tuning", "num_virtual_tokens": 20}, {"method": "prefix_tuning", "num_virtual_tokens": 20}]


@pytest.mark.parametrize("adapter", PROMPTS, ids=lambda adapter: adapter["method"])
def test_a_learned_prompt_and_the_longest_text_share_the_positions_of_an_encoder(
        adapter, classify, write_rows, train, tmp_path, capsys):
    data = {"train": write_rows("long.jsonl", LONG), "validation": write_rows("held.jsonl", LONG[:6])}
    settings = {**classify, "adapter": adapter, "data": {**data, "max_length": 400}}
    folder = train(settings, "train.max_steps=2")
    assert "reads at most 108 tokens beside the 20 of the learned prompt" in capsys.readouterr().out
    assert json.loads((folder / "final" / "tokenizer_config.json").read_text())["model_max_length"] == 108
    assert main(["evaluate", str(folder)]) == 0
    texts = write_rows("new.jsonl", [{"text": row["text"]} for row in LONG[:3]])
    assert main(["predict", str(folder), "--input", texts, "--output", str(tmp_path / "said.jsonl")]) == 0
    capsys.readouterr()
    assert main(["check", str(write_config(settings, tmp_path / "checked")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["train"]["truncated"] == 20


@pytest.mark.parametrize("adapter", PROMPTS, ids=lambda adapter: adapter["method"])
def test_a_learned_prompt_a_text_and_its_answer_share_the_positions_of_a_decoder(adapter, continued, train, capsys):
    folder = train({**continued, "adapter": adapter})
    assert "the model has 44 positions for text: prompts of more than 4 tokens" in capsys.readouterr().out
    assert summary(folder)["metrics"]["validation"]["rouge_l"] is not None


def test_a_learned_prompt_that_leaves_no_position_for_text_is_refused(classify, tmp_path, capsys):
    settings = {**classify, "adapter": {"method": "prompt_tuning", "num_virtual_tokens": 128}}
    assert main(["check", str(write_config(settings, tmp_path / "checked"))]) == 2
    assert "the model has 128 positions, and none is left for text" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["bert", "camembert", "data2vec-text", "gpt2", "lilt", "luke", "mpnet", "roberta",
                                    "xlm-roberta", "xmod"])
def test_a_text_may_be_as_long_as_the_table_of_positions_has_rows_for(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=61, hidden_size=48, intermediate_size=48, num_hidden_layers=1,
                                  num_attention_heads=4, max_position_embeddings=24, pad_token_id=1)
    if family == "xmod":
        config.default_language = "en_XX"
    model, limit = AutoModel.from_config(config).eval(), longest_input(config, 40)
    ids = torch.full((1, limit + 1), 7)
    model(input_ids=ids[:, :limit])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)


def test_a_model_of_relative_positions_has_no_table_that_ends():
    config = AutoConfig.for_model("xlnet", vocab_size=61, d_model=32, n_layer=1, n_head=4, d_inner=48)
    assert longest_input(config, 40) == 40
