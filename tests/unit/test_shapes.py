"""Conversations in the shapes that other frameworks write: what of a row is read, and what of it is learned."""

import pytest

from peftune.data.canonical import CANONICAL, prompt_fields
from peftune.data.formats import COLUMNS
from peftune.data.preferences import preference_fields
from peftune.data.targets import RowFault
from tests.templates import FAMILIES, family_tokenizer
from tests.unit.test_templates import marked_text

SYSTEM, ASKED, SAID = ({"role": role, "content": text} for role, text in
                       (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!")))
AGAIN, BYE = {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you."}


def learned(decoder, fields):
    return marked_text(family_tokenizer(decoder, FAMILIES["plain"]), fields["messages"])


BOTH = "### User:\nHi\n### Assistant:\n{}\n### User:\nBye\n### Assistant:\n{}\n".format


@pytest.mark.parametrize(("weights", "expected"), [
    ((0, 1), BOTH("Hello!</s>", "«See you.</s>»")), ((1, 0), BOTH("«Hello!</s>»", "See you.</s>")),
    ((1, 1), BOTH("«Hello!</s>»", "«See you.</s>»")), ((0.0, None), BOTH("Hello!</s>", "«See you.</s>»"))])
def test_a_turn_of_weight_0_is_read_and_not_learned(decoder, weights, expected):
    turns = [ASKED, {**SAID, "weight": weights[0]}, AGAIN, {**BYE, "weight": weights[1]}]
    assert learned(decoder, CANONICAL["messages"]({"messages": turns})) == expected


@pytest.mark.parametrize("weight", [0.5, 2, "0"])
def test_other_weights_of_turns_are_refused(weight):
    with pytest.raises(RowFault, match="turn 2 of messages: weight is"):
        CANONICAL["messages"]({"messages": [ASKED, {**SAID, "weight": weight}]})


def test_a_row_all_of_whose_turns_weigh_nothing_is_refused():
    with pytest.raises(RowFault, match="no assistant turn to learn from"):
        CANONICAL["messages"]({"messages": [ASKED, {**SAID, "weight": 0}]})


@pytest.mark.parametrize("completion", [[BYE], "See you."])
def test_of_a_prompt_and_a_completion_of_turns_the_completion_is_learned(decoder, completion):
    row = {"prompt": [ASKED, SAID, AGAIN], "completion": completion}
    assert learned(decoder, CANONICAL["prompt_completion"](row)) == BOTH("Hello!</s>", "«See you.</s>»")


def test_a_prompt_of_turns_is_predicted_from_as_it_was_read():
    trained = CANONICAL["prompt_completion"]({"prompt": [SYSTEM, ASKED], "completion": [SAID]})
    assert prompt_fields({"prompt": [SYSTEM, ASKED]}, "prompt_completion")["messages"] == trained["messages"][:-1]


def test_earlier_turns_of_an_alpaca_row_come_first():
    row = {"instruction": "Bye", "output": "See you.", "system": "Be brief.", "history": [["Hi", "Hello!"]]}
    assert CANONICAL["alpaca"](row)["messages"] == [SYSTEM, ASKED, SAID, AGAIN, BYE]
    del row["output"]
    assert prompt_fields(row, "alpaca")["messages"] == [SYSTEM, ASKED, SAID, AGAIN]


@pytest.mark.parametrize("history", [[["Hi"]], "Hi", [["Hi", None]], [{"Hi": "Hello!"}]])
def test_earlier_turns_that_are_no_pairs_of_texts_are_refused(history):
    with pytest.raises(RowFault, match="history"):
        CANONICAL["alpaca"]({"instruction": "Bye", "output": "See you.", "history": history})


@pytest.mark.parametrize("nothing", [None, "", []])
def test_an_alpaca_row_may_have_no_earlier_turns(nothing):
    row = {"instruction": "Hi", "output": "Hello!", "history": nothing}
    assert CANONICAL["alpaca"](row)["messages"] == [ASKED, SAID]


@pytest.mark.parametrize("turns", [[ASKED, SAID], [SYSTEM, ASKED, SAID]])
@pytest.mark.parametrize("format", ["messages", "sharegpt"])
def test_a_column_system_comes_before_the_turns_once(format, turns):
    column = {"messages": "messages", "sharegpt": "conversations"}[format]
    assert CANONICAL[format]({column: turns, "system": "Be brief."})["messages"] == [SYSTEM, ASKED, SAID]


@pytest.mark.parametrize("row", [
    {"prompt": [ASKED], "chosen": "Hello!", "rejected": "What?"},
    {"chosen": [ASKED, SAID], "rejected": [ASKED, {**SAID, "content": "What?"}]},
    {"prompt": "Hi", "chosen": [SAID], "rejected": [{**SAID, "content": "What?"}]},
    {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
])
def test_a_column_system_comes_before_the_prompt_of_a_pair(row):
    assert preference_fields({**row, "system": "Be brief."})["messages"] == [SYSTEM, ASKED]


@pytest.mark.parametrize("system", ["", None, "Be brief."])
def test_a_prompt_beside_a_column_system_is_a_turn_of_the_user_filled_or_not(decoder, system):
    row = {"system": system, "prompt": "Hi"}
    asked = "### System:\nBe brief.\n### User:\nHi\n" if system else "### User:\nHi\n"
    fields = CANONICAL["prompt_completion"]({**row, "completion": "Hello!"})
    assert learned(decoder, fields) == f"{asked}### Assistant:\n«Hello!</s>»\n"
    assert prompt_fields(row, "prompt_completion") == {"messages": fields["messages"][:-1]}
    assert preference_fields({**row, "chosen": "a", "rejected": "b"})["messages"] == fields["messages"][:-1]


@pytest.mark.parametrize("row", [
    {"prompt": "Hi", "completion": "Hello!"}, {"messages": [ASKED, SAID]}, {"conversations": [ASKED, SAID]},
    {"instruction": "Hi", "output": "Hello!"}, {"prompt": [ASKED], "completion": "Hello!"},
])
def test_a_system_that_is_no_text_is_refused(row):
    format = next(name for name in CANONICAL if all(column in row for column in COLUMNS[name]))
    with pytest.raises(RowFault, match="system is the number 3, not a text"):
        CANONICAL[format]({**row, "system": 3})


def test_turns_are_read_by_either_pair_of_names():
    theirs = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
    assert CANONICAL["messages"]({"messages": theirs})["messages"] == [ASKED, SAID]
    assert CANONICAL["sharegpt"]({"conversations": [ASKED, SAID]})["messages"] == [ASKED, SAID]


def in_parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def test_parts_of_a_content_are_joined_as_they_stand():
    turns = [{"role": "user", "content": in_parts("H", "i")}, {"role": "assistant", "content": in_parts("Hello", "!")}]
    assert CANONICAL["messages"]({"messages": turns})["messages"] == [ASKED, SAID]
    sides = {key: [ASKED, {"role": "assistant", "content": in_parts(key)}] for key in ("chosen", "rejected")}
    assert preference_fields(sides) == {"messages": [ASKED], "chosen": "chosen", "rejected": "rejected"}


@pytest.mark.parametrize(("part", "said"), [
    ({"type": "image_url", "image_url": {"url": "x"}}, "of type 'image_url'"),
    *((part, "no record of a text") for part in ({"type": "text", "text": None}, {"text": "Hi"}, "Hi"))])
def test_a_part_of_a_content_that_is_no_text_is_refused_with_its_place(part, said):
    turns = [ASKED, {"role": "assistant", "content": [*in_parts("Hello"), part]}]
    with pytest.raises(RowFault) as caught:
        CANONICAL["messages"]({"messages": turns})
    assert caught.value.message.startswith(f"turn 2 of messages: content[1] is {said}, and only text is read")


def test_what_a_developer_says_is_a_system_turn():
    turns = [{"role": "developer", "content": "Be brief."}, ASKED, SAID]
    assert CANONICAL["messages"]({"messages": turns})["messages"] == [SYSTEM, ASKED, SAID]
