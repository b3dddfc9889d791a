"""Templates that write today's date: what is learned and scored must not depend on the day."""

import pytest

from peftune.data.chat import render
from tests.templates import Family, family_tokenizer

TURNS = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
SHOWN = "<|user|>Hi<|assistant|>Hello!"


@pytest.mark.parametrize(("template", "expected"), [
    ("\n{%- set day = strftime_now('%d %b %Y') if strftime_now is defined else 'none' %}Today: {{ day }}\n" + TURNS,
     "Today: 26 Jul 2024\n" + SHOWN),
    ("{{ 'Current date: ' + strftime_now('%Y-%m-%d') }}\n" + TURNS, "Current date: 2024-07-26\n" + SHOWN),
    ("\n  {{ strftime_now('%B') }}" + TURNS, "\n  July" + SHOWN),
    ("\n  " + TURNS, "\n" + SHOWN),
])
def test_a_template_writes_one_day_and_is_else_as_it_was(decoder, template, expected):
    tokenizer = family_tokenizer(decoder, Family(template, "</s>", marks=()))
    assert render(tokenizer, SAID, None) == expected
