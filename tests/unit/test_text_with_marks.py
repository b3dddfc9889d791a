"""Texts that hold end-of-text and begin-of-text tokens of their own: joined documents, chats rendered before."""

import pytest
from transformers import AutoTokenizer

from peftune.config.schema import DataConfig
from peftune.data.rows import Row
from peftune.numerics.losses import IGNORE
from peftune.tasks.causal_lm import NEXT_TOKEN, encode
from peftune.tasks.supervision import prompt_tokens
from peftune.tasks.task import TextEncoder
from tests.templates import FAMILIES, family_tokenizer

CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>"
ASKED, SAID = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello!<|im_end|>"


def encoder(decoder, family="chatml", train_on="completion"):
    return TextEncoder(family_tokenizer(decoder, FAMILIES[family]), 1000, DataConfig(train="f", train_on=train_on))


def learned(fields, text):
    """The whole text, and what of it is learned."""
    [example] = encode(Row(fields, "f", 1, "0"), NEXT_TOKEN, text)
    targets = [token for token in example.targets if token != IGNORE]
    return text.tokenizer.decode(list(example.input_ids)), text.tokenizer.decode(targets)


@pytest.mark.parametrize("train_on", ["completion", "all", "last_turn"])
@pytest.mark.parametrize("written", [CHAT, "one<|im_end|>two<|im_end|>", CHAT + "\n" + CHAT])
def test_all_of_a_text_is_learned_also_behind_an_end_of_text(decoder, written, train_on):
    assert learned({"text": written}, encoder(decoder, train_on=train_on)) == (written, written)


def test_all_of_a_completion_is_learned_also_behind_an_end_of_text(decoder):
    turns = f"{SAID}\n{ASKED}Hello again!<|im_end|>"
    assert learned({"prompt": ASKED, "completion": turns}, encoder(decoder)) == (ASKED + turns, turns)


@pytest.mark.parametrize("blank", ["\n", " \n\n"])
def test_a_text_that_ends_in_an_end_of_text_and_white_space_is_not_ended_twice(decoder, blank):
    text = encoder(decoder)
    assert learned({"text": CHAT + blank}, text) == (CHAT, CHAT)
    assert learned({"prompt": ASKED, "completion": SAID + blank}, text) == (ASKED + SAID, SAID)


def test_a_text_without_an_end_of_text_is_given_one(decoder):
    assert learned({"text": "one<|im_end|>two\n"}, encoder(decoder))[1] == "one<|im_end|>two\n<|im_end|>"


@pytest.mark.parametrize(("fields", "expected"), [
    ({"text": "<s>[INST] Hi [/INST] Hello!</s>"}, "<s>[INST] Hi [/INST] Hello!</s>"),
    ({"text": "Hello!"}, "<s>Hello!</s>"),
    ({"prompt": "<s>[INST] Hi [/INST]", "completion": " Hello!"}, "<s>[INST] Hi [/INST] Hello!</s>"),
])
def test_a_text_begins_with_one_begin_of_text(decoder, fields, expected):
    assert learned(fields, encoder(decoder, "mistral"))[0] == expected


def test_a_prompt_to_predict_from_begins_as_it_was_trained(decoder):
    text = encoder(decoder, "mistral")
    [example] = encode(Row({"prompt": "<s>[INST] Hi [/INST]", "completion": " Hello!"}, "f", 1, "0"), NEXT_TOKEN, text)
    trained = list(example.input_ids)[: example.record["prompt_length"]]
    assert list(prompt_tokens({"prompt": "<s>[INST] Hi [/INST]"}, text).input_ids) == trained


@pytest.mark.parametrize("prompt", ["x", "the printer"], ids=["one token", "more"])
def test_a_prompt_is_continued_however_short_and_a_text_is_not(decoder, prompt):
    text = TextEncoder(AutoTokenizer.from_pretrained(decoder), 1000, DataConfig(train="f"))
    [answered] = encode(Row({"prompt": prompt, "completion": " is fine now"}, "f", 1, "0"), NEXT_TOKEN, text)
    assert answered.record["prompt_length"] == len(text.tokenizer(prompt)["input_ids"])
    assert answered.record["reference"] == "is fine now"
    for fields in ({"text": prompt + " is fine now"}, {"prompt": "", "completion": "is fine now"}):
        [whole] = encode(Row(fields, "f", 1, "0"), NEXT_TOKEN, text)
        assert whole.record["prompt_length"] == 0 and whole.record["reference"] is None
