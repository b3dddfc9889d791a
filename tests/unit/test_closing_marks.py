"""Templates that close a whole conversation otherwise than its turns: by a further mark, or by another one."""

import pytest

from tests.templates import Family, family_tokenizer
from tests.unit.test_templates import conversation, encoded, marked_tokens

PHI3 = Family(
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}",
    "<|endoftext|>", marks=("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"))
GPT_OSS = Family(
    "{% for m in messages %}{{ '<|start|>' + m['role'] }}{{ '<|channel|>final' if m['role'] == 'assistant' }}"
    "{{ '<|message|>' + m['content'] }}"
    "{% set closes = loop.last and m['role'] == 'assistant' and not add_generation_prompt %}"
    "{{ '<|return|>' if closes else '<|end|>' }}{% endfor %}{{ '<|start|>assistant' if add_generation_prompt }}",
    "<|return|>", marks=("<|start|>", "<|channel|>", "<|message|>", "<|end|>"))
FAMILIES = {"phi3": PHI3, "gpt_oss": GPT_OSS}

TURNS = (("Hi", "Hello!"), ("Bye", "See you."), ("Bye", "<|"))
PHI3_TEXT = ("<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n«Hello!<|end|>\n»"
             "<|user|>\nBye<|end|>\n<|assistant|>\n«See you.<|end|>\n»"
             "<|user|>\nBye<|end|>\n<|assistant|>\n«<|<|end|>\n<|endoftext|>»")
GPT_OSS_TEXT = ("<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>Hi<|end|>"
                "<|start|>assistant«<|channel|>final<|message|>Hello!<|end|>»<|start|>user<|message|>Bye<|end|>"
                "<|start|>assistant«<|channel|>final<|message|>See you.<|end|>»<|start|>user<|message|>Bye<|end|>"
                "<|start|>assistant«<|channel|>final<|message|><|<|return|>»")


@pytest.mark.parametrize(("name", "expected"), [("phi3", PHI3_TEXT), ("gpt_oss", GPT_OSS_TEXT)])
def test_turns_before_the_last_are_learned_with_their_own_end_mark(decoder, name, expected):
    tokenizer = family_tokenizer(decoder, FAMILIES[name])
    messages = conversation(TURNS, "Be brief.")
    assert marked_tokens(tokenizer, messages) == expected
    before, last = expected.rsplit("«", 1)
    assert (marked_tokens(tokenizer, messages, train_on="last_turn")
            == f"{before.replace('«', '').replace('»', '')}«{last}")


@pytest.mark.parametrize(("name", "expected"), [
    ("phi3", "<|user|>\nHi<|end|>\n<|assistant|>\n«Hello!<|end|>\n<|endoftext|>»"),
    ("gpt_oss", "<|start|>user<|message|>Hi<|end|>"
                "<|start|>assistant«<|channel|>final<|message|>Hello!<|end|><|return|>»"),
])
def test_an_answer_before_a_last_turn_of_the_user_is_learned(decoder, name, expected):
    tokenizer = family_tokenizer(decoder, FAMILIES[name])
    messages = [*conversation(TURNS[:1]), {"role": "user", "content": "Still there?"}]
    assert marked_tokens(tokenizer, messages) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_read_before_the_last_answer_is_what_generation_reads(decoder, name):
    tokenizer = family_tokenizer(decoder, FAMILIES[name])
    messages = conversation(TURNS)
    example = encoded(tokenizer, messages)
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    read = list(example.input_ids)[: example.record["prompt_length"]]
    assert read == tokenizer(prompt, add_special_tokens=False)["input_ids"]
