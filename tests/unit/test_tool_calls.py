"""Arguments of tool calls: records and JSON texts are the same, whichever of the two a template reads."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from peftune.config.schema import Source
from peftune.data.canonical import CANONICAL
from peftune.data.chat import TemplateMismatch, render
from peftune.data.rows import Faults
from peftune.data.sources import read
from peftune.data.targets import RowFault
from tests.templates import CALLED, CALLING, FAMILIES, TOOLS, Family, family_tokenizer
from tests.unit.test_templates import marked_text

CONCATENATING = Family(
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% for c in m['tool_calls'] or [] %}"
    "{{ c['function']['name'] + ' ' + c['function']['arguments'] }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}", "</s>")


def calling(arguments):
    """The row that calls a tool, with these arguments."""
    turns = [{**turn, "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": arguments}}]}
             if "tool_calls" in turn else turn for turn in CALLING]
    return {"messages": turns, "tools": TOOLS}


@pytest.mark.parametrize("name", CALLED)
def test_arguments_that_are_a_json_text_are_learned_as_the_record_they_stand_for(decoder, name):
    fields = CANONICAL["messages"](calling('{"what":"p2"}'))
    assert marked_text(family_tokenizer(decoder, FAMILIES[name]), fields["messages"], fields["tools"]) == CALLED[name]


@pytest.mark.parametrize("arguments", ['{"what": "é"}', {"what": "é"}])
def test_a_template_that_takes_no_record_is_given_a_json_text(decoder, arguments):
    tokenizer = family_tokenizer(decoder, CONCATENATING)
    text = render(tokenizer, CANONICAL["messages"](calling(arguments))["messages"], None)
    assert 'assistant: find {"what": "é"}</s>' in text


def test_arguments_may_be_left_out_as_an_empty_text():
    fields = CANONICAL["messages"](calling(""))
    assert fields["messages"][1]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("arguments", ["{what: p2}", '["p2"]', '"p2"', "p2"])
def test_arguments_that_are_no_record_are_refused(arguments):
    with pytest.raises(RowFault, match="turn 2 calls a tool with arguments that are no JSON record"):
        CANONICAL["messages"](calling(arguments))


def in_turns_of_function_call(said):
    """The same row as LLaMA-Factory writes it."""
    roles = {"user": "human", "assistant": "gpt", "tool": "observation"}
    turns = [{"from": roles[turn["role"]], "value": turn["content"]} for turn in CALLING]
    turns[1] = {"from": "function_call", "value": said}
    return {"conversations": turns, "tools": json.dumps(TOOLS)}


@pytest.mark.parametrize("said", ['{"name": "find", "arguments": {"what": "p2"}}',
                                  '[{"name": "find", "arguments": "{\\"what\\": \\"p2\\"}"}]'])
@pytest.mark.parametrize("name", CALLED)
def test_turns_of_function_call_are_learned_as_calls(decoder, name, said):
    fields = CANONICAL["sharegpt"](in_turns_of_function_call(said))
    assert marked_text(family_tokenizer(decoder, FAMILIES[name]), fields["messages"], fields["tools"]) == CALLED[name]


@pytest.mark.parametrize("said", ["find p2", "{}", "[]", "3", '{"name": "find", "arguments": ["p2"]}', '["find"]'])
def test_turns_of_function_call_that_hold_none_are_refused_with_their_place(said):
    with pytest.raises(RowFault, match="turn 2 of conversations: value is no call of a function"):
        CANONICAL["sharegpt"](in_turns_of_function_call(said))


def test_a_refusal_of_the_template_is_said_where_arguments_are_not_the_reason(decoder):
    tokenizer = family_tokenizer(decoder, Family("{{ raise_exception('no tools here') }}", "</s>"))
    with pytest.raises(TemplateMismatch, match="no tools here"):
        render(tokenizer, CANONICAL["messages"](calling({"what": "p2"}))["messages"], None)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_calls_of_several_tools_have_their_own_arguments_alone(tmp_path, kind):
    calls = [{"type": "function", "function": {"name": "find", "arguments": {"what": "p2", "near": {"floor": 2}}}},
             {"type": "function", "function": {"name": "call", "arguments": {"whom": "Ada"}}}]
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": calls}],
           "tools": [{"name": "find", "parameters": {"what": {"type": "string"}}},
                     {"name": "call", "parameters": {"whom": {"type": "string"}}}]}
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps(row), encoding="utf-8")
    [read_row] = read(Source(path=str(path)), Faults())
    fields = CANONICAL["messages"](read_row.values)
    assert fields["messages"][1]["tool_calls"] == calls and fields["tools"] == row["tools"]


def test_a_null_that_json_writes_is_an_argument():
    fields = CANONICAL["messages"](calling({"what": None}))
    assert fields["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"what": None}
