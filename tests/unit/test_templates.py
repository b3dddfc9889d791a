"""What of a conversation is learned, in the formats of well-known model families; written by hand, «in these marks»."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peftune.config.schema import DataConfig
from peftune.data.chat import TemplateMismatch, assistant_spans, last_assistant_span, render, round_trip_fault
from peftune.data.rows import Row
from peftune.numerics.losses import IGNORE
from peftune.tasks.causal_lm import NEXT_TOKEN, encode
from peftune.tasks.task import TextEncoder
from tests.templates import (
    CALLED,
    CALLING,
    FAMILIES,
    MISTRAL,
    R1,
    TOOLS,
    WRITTEN,
    Family,
    call,
    chatml,
    family_tokenizer,
    mistral,
)

TURNS = (
    ("Hi", "Hello!"),
    ("Say: end", "end"),  # which is a part of some end marks
    ("Which printer is it?", "The one on floor 2:\n\n    café 🙂"),
    ("Are you an assistant?", "I am an assistant, you are the user."),
    ("Once more, please.", "I am an assistant, you are the user."),
)


@pytest.fixture
def tokenizer(decoder, name):
    return family_tokenizer(decoder, FAMILIES[name])


def conversation(turns, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    for asked, said in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return messages


def marked_text(tokenizer, messages, tools=None):
    """The rendered text with each span marked, up to its first end of text; only white space may follow that."""
    whole, spans = assistant_spans(tokenizer, messages, tools)
    written, last = "", 0
    for begin, after in spans:
        said, end, blank = whole[begin:after].partition(tokenizer.eos_token)
        assert not blank.strip()
        written, last = f"{written}{whole[last:begin]}«{said}{end}»", begin + len(said + end)
    return written + whole[last:]


def encoded(tokenizer, messages, tools=None, train_on="completion"):
    fields = {"messages": messages, **({"tools": tools} if tools else {})}
    text = TextEncoder(tokenizer, 2000, DataConfig(train="f", train_on=train_on))
    [example] = encode(Row(fields, "f", 1, "0"), NEXT_TOKEN, text)
    return example


def marked_tokens(tokenizer, *conversation_and_tools, train_on="completion"):
    """The tokens of the encoded row as text, each run of targets marked."""
    example = encoded(tokenizer, *conversation_and_tools, train_on=train_on)
    ids, learned = list(example.input_ids), [target != IGNORE for target in example.targets]
    assert all(target in (token, IGNORE) for token, target in zip(ids, example.targets, strict=True))
    assert example.num_targets == sum(learned)
    written, first = "", 0
    for after in range(1, len(ids) + 1):
        if after == len(ids) or learned[after] != learned[first]:
            text = tokenizer.decode(ids[first:after], clean_up_tokenization_spaces=False)
            written, first = written + (f"«{text}»" if learned[first] else text), after
    return written


def check(tokenizer, messages, expected, tools=None):
    """Text, spans and tokens against an expectation; no token after the last target is kept."""
    assert render(tokenizer, messages, tools) == expected.replace("«", "").replace("»", "")
    assert marked_text(tokenizer, messages, tools) == expected
    assert marked_tokens(tokenizer, messages, tools) == expected[: expected.rindex("»") + 1]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_answer_is_learned_with_its_end_mark_and_nothing_else(tokenizer, name, count, system):
    check(tokenizer, conversation(TURNS[:count], system), WRITTEN[name](TURNS[:count], system))


_CHATML = ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
           "<|im_start|>assistant\n«Hello!<|im_end|>»\n<|im_start|>user\nBye<|im_end|>\n")


@pytest.mark.parametrize(("name", "expected"), [
    ("chatml", _CHATML + "<|im_start|>assistant\n«See you.<|im_end|>»\n"),
    ("qwen", _CHATML + "<|im_start|>assistant\n«See you.<|im_end|>»\n"),
    ("qwen3", _CHATML + "<|im_start|>assistant\n«<think>\n\n</think>\n\nSee you.<|im_end|>»\n"),
    ("plain", "### System:\nBe brief.\n### User:\nHi\n### Assistant:\n«Hello!</s>»\n"
              "### User:\nBye\n### Assistant:\n«See you.</s>»\n"),
    ("llama3", "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nKnowledge ends in May.\n\n"
               "Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n«Hello!<|eot_id|>»"
               "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n«See you.<|eot_id|>»"),
    ("gemma", "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n«Hello!<end_of_turn>»\n"
              "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n«See you.<end_of_turn>»\n"),
    ("mistral", "<s>[INST] Be brief.\n\nHi [/INST]« Hello!</s>»[INST] Bye [/INST]« See you.</s>»"),
])
def test_two_turns_after_a_system_turn_read_as_written_out_here(tokenizer, expected):
    check(tokenizer, conversation([("Hi", "Hello!"), ("Bye", "See you.")], "Be brief."), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_last_turn_of_the_user_is_cut(tokenizer, name):
    messages = [*conversation(TURNS[:2]), {"role": "user", "content": "Still there?"}]
    expected = WRITTEN[name](TURNS[:2], None).replace("<think>\n\n</think>\n\n", "")  # qwen3: the answer is not last
    expected = expected.replace("<think>\n«\n</think>\n\n", "«")  # qwen35
    assert marked_tokens(tokenizer, messages) == expected[: expected.rindex("»") + 1]


@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_white_space_that_a_template_trims_is_in_no_target(tokenizer, name):
    spaced = [(f"\n {asked} ", f" \n{said}\n\n ") for asked, said in TURNS]
    check(tokenizer, conversation(spaced), WRITTEN[name](TURNS, None))


@pytest.mark.parametrize("name", ["chatml", "qwen", "qwen3", "mistral"])
def test_white_space_that_a_template_keeps_is_learned(tokenizer, name):
    spaced = [(f" {asked}", f"  {said} \n") for asked, said in TURNS]
    check(tokenizer, conversation(spaced), WRITTEN[name](spaced, None))


@pytest.mark.parametrize("name", FAMILIES)
def test_of_the_last_turn_alone_the_earlier_answers_are_text_to_read(tokenizer, name):
    before, last = WRITTEN[name](TURNS, "Be brief.").rsplit("«", 1)
    read = before.replace("«", "").replace("»", "")
    messages = conversation(TURNS, "Be brief.")
    assert marked_tokens(tokenizer, messages, train_on="last_turn") == f"{read}«{last[: last.rindex('»') + 1]}"
    whole, spans = assistant_spans(tokenizer, messages, None)
    assert last_assistant_span(tokenizer, messages, None) == (whole, spans[-1:])


@pytest.mark.parametrize("said", ["assistant", "model", "user", "e", "n", "I", "system", "think", "]", "<|", "\ue000"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_that_is_a_part_of_the_template_is_found_where_it_stands(tokenizer, name, said):
    turns = [("assistant", said), (said, said), ("user", said)]
    check(tokenizer, conversation(turns), WRITTEN[name](turns, None))


GREETED = {
    "chatml": "<|im_start|>assistant\n«{}<|im_end|>»\n<|im_start|>user\nHi<|im_end|>\n"
              "<|im_start|>assistant\n«Hello!<|im_end|>»\n",
    "plain": "### Assistant:\n«{}</s>»\n### User:\nHi\n### Assistant:\n«Hello!</s>»\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nKnowledge ends in May.\n\n<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n«{}<|eot_id|>»"
              "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n«Hello!<|eot_id|>»",
    "qwen": "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>assistant\n«{}<|im_end|>»\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello!<|im_end|>»\n",
    "qwen3": "<|im_start|>assistant\n«{}<|im_end|>»\n<|im_start|>user\nHi<|im_end|>\n"
             "<|im_start|>assistant\n«<think>\n\n</think>\n\nHello!<|im_end|>»\n",
}


@pytest.mark.parametrize("said", ["assistant", "You are", "  Welcome! "])
@pytest.mark.parametrize("name", GREETED)
def test_a_conversation_may_begin_with_an_answer(tokenizer, name, said):
    messages = [{"role": "assistant", "content": said}, *conversation([("Hi", "Hello!")])]
    check(tokenizer, messages, GREETED[name].format(said.strip() if name == "llama3" else said))


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_a_template_that_wants_the_user_first_refuses_an_answer_there(tokenizer):
    with pytest.raises(TemplateMismatch, match="take turns"):
        assistant_spans(tokenizer, [{"role": "assistant", "content": "Hello!"}, *conversation(TURNS[:1])], None)


@pytest.mark.parametrize("name", CALLED)
def test_a_call_of_a_tool_is_learned_and_what_the_tool_says_is_not(tokenizer, name):
    check(tokenizer, CALLING, CALLED[name], TOOLS)


@pytest.mark.parametrize(("name", "thought"), [("qwen", ""), ("qwen3", "<think>\n\n</think>\n\n")])
def test_calls_with_a_word_before_them_are_learned_and_each_tool_passes(tokenizer, thought):
    messages = [
        {"role": "user", "content": "Where is p2?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call("find", what="p2"), call("call")]},
        {"role": "tool", "content": "floor 2"}, {"role": "tool", "content": "I look."},
        {"role": "assistant", "content": "", "tool_calls": [call("call")]}, {"role": "tool", "content": "Hello!"},
        {"role": "assistant", "content": "On floor 2."}, *conversation([("Thanks", "Hello!")]),
    ]
    check(tokenizer, [{"role": "system", "content": "Be brief."}, *messages], (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhere is p2?<|im_end|>\n<|im_start|>assistant\n"
        "«I look.\n<tool_call>\n{\"name\": \"find\", \"arguments\": {\"what\": \"p2\"}}\n</tool_call>\n"
        "<tool_call>\n{\"name\": \"call\", \"arguments\": {}}\n</tool_call><|im_end|>»\n"
        "<|im_start|>user\n<tool_response>\nfloor 2\n</tool_response>\n"
        "<tool_response>\nI look.\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "«<tool_call>\n{\"name\": \"call\", \"arguments\": {}}\n</tool_call><|im_end|>»\n"
        "<|im_start|>user\n<tool_response>\nHello!\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n«On floor 2.<|im_end|>»\n<|im_start|>user\nThanks<|im_end|>\n"
        "<|im_start|>assistant\n«" + thought + "Hello!<|im_end|>»\n"))


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_a_call_that_the_template_leaves_out_is_refused_rather_than_learned_as_silence(tokenizer):
    with pytest.raises(TemplateMismatch, match="turn 2 calls tools"):
        assistant_spans(tokenizer, CALLING, None)


@pytest.mark.parametrize("name", ["qwen3"])
def test_thinking_is_learned_in_the_last_turn_and_earlier_turns_are_learned_without(tokenizer):
    messages = conversation([("Hi", "<think>\nA greeting.\n</think>\n\nHello!"),
                             ("Bye", "<think>\nThe end.\n</think>\n\nSee you.")])
    expected = ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello!<|im_end|>»\n"
                "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
                "«<think>\nThe end.\n</think>\n\nSee you.<|im_end|>»\n")
    check(tokenizer, messages, expected)
    messages[1] = {"role": "assistant", "content": "Hello!", "reasoning_content": "A greeting."}
    check(tokenizer, messages, expected)


@pytest.mark.parametrize("thought", [
    "<think>\nThe end.\n</think>\n\nSee you.", "<think>The end.\n</think>\n\nSee you.",
    "The end.\n</think>\n\nSee you.", None])
@pytest.mark.parametrize(("name", "expected"), [
    ("r1", "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>«Hello!<｜end▁of▁sentence｜>»<｜User｜>Bye"
           "<｜Assistant｜><think>\n«The end.\n</think>\n\nSee you.<｜end▁of▁sentence｜>»"),
    ("qwen35", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello!<|im_end|>»\n"
               "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n<think>\n"
               "«The end.\n</think>\n\nSee you.<|im_end|>»\n"),
])
def test_thinking_behind_a_prompt_that_opens_it_is_learned_in_the_last_turn(tokenizer, name, expected, thought):
    messages = conversation([("Hi", "Hello!"), ("Bye", thought or "See you.")])
    if thought is None:
        messages[-1]["reasoning_content"] = "The end."
    assert marked_text(tokenizer, messages) == expected
    written = expected[: expected.rindex("»") + 1]
    assert marked_tokens(tokenizer, messages) == written
    asked = render(tokenizer, messages[:-1], None, generation_prompt=True)
    assert written.replace("«", "").replace("»", "").startswith(asked)
    assert marked_tokens(tokenizer, messages, train_on="last_turn") == written.replace("«", "", 1).replace("»", "", 1)
    assert round_trip_fault(tokenizer, messages, None, encoded(tokenizer, messages).input_ids) is None


def test_thinking_that_no_place_is_found_for_is_refused(decoder):
    template = R1.replace("m['content'].split", "' ' + m['content'].split")
    tokenizer = family_tokenizer(decoder, Family(template, "</s>"))
    with pytest.raises(TemplateMismatch, match="turn 2 thinks, and the chat template leaves that out"):
        assistant_spans(tokenizer, conversation([("Hi", "<think>\nSo.\n</think>\n\nHello!")]), None)


@pytest.mark.parametrize("name", ["qwen3"])
def test_a_turn_that_reads_thinking_which_later_turns_drop_is_refused_and_the_last_turn_can_be_learned(tokenizer):
    messages = [CALLING[0], {**CALLING[1], "reasoning_content": "I look."}, *CALLING[2:]]
    assert "«<think>\nI look.\n</think>\n\n<tool_call>" in marked_tokens(tokenizer, messages)
    messages += conversation([("Thanks", "Hello!")])
    with pytest.raises(TemplateMismatch, match="before turn 4 otherwise"):
        assistant_spans(tokenizer, messages, None)
    whole, [(begin, end)] = last_assistant_span(tokenizer, messages, None)
    assert whole[begin:end] == "<think>\n\n</think>\n\nHello!<|im_end|>\n"


def test_a_system_turn_that_is_shown_for_generation_only_is_refused(decoder):
    template = MISTRAL.replace("named and loop.first", "named and loop.last")
    tokenizer = family_tokenizer(decoder, Family(template, "</s>", "<s>"))
    check(tokenizer, conversation(TURNS), mistral(TURNS, None))
    with pytest.raises(TemplateMismatch, match="before turn 3 otherwise"):
        assistant_spans(tokenizer, conversation(TURNS[:1], "Be brief."), None)


@pytest.mark.parametrize("name", ["chatml", "plain", "llama3", "qwen"])
def test_two_answers_in_a_row_are_both_learned(tokenizer, name):
    asked = WRITTEN[name]([("Hi", "Hello!")], None)
    mark = {"plain": "### Assistant:\n", "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n"}.get(
        name, "<|im_start|>assistant\n")
    check(tokenizer, [*conversation([("Hi", "Hello!")]), {"role": "assistant", "content": "Hello!"}],
          asked + mark + asked[asked.index("«"):])


def test_an_end_mark_that_stands_between_turns_only_is_learned_after_every_answer(decoder):
    template = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
                "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    tokenizer = family_tokenizer(decoder, Family(template, "<|im_end|>", marks=("<|im_start|>",)))
    expected = chatml(TURNS, None)
    assert marked_tokens(tokenizer, conversation(TURNS)) == expected[: expected.rindex("»") + 1]


@pytest.mark.parametrize("name", ["qwen"])
def test_tools_that_are_no_records_are_refused(tokenizer):
    with pytest.raises(TemplateMismatch, match="JSON schema"):
        assistant_spans(tokenizer, conversation(TURNS), ["find"])


@pytest.mark.parametrize("name", ["chatml"])
def test_white_space_is_learned_also_where_the_tokenizer_says_it_takes_no_room(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    turns = [("Hi", "if  so:     go  "), ("Hi", "  go")]
    check(tokenizer, conversation(turns), chatml(turns, None))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_comes_back_from_its_tokens(tokenizer, name):
    messages = conversation(TURNS, "Be brief.")
    ids = encoded(tokenizer, messages).input_ids
    assert round_trip_fault(tokenizer, messages, None, ids) is None
    assert "answer 5" in round_trip_fault(tokenizer, messages, None, ids[:-6])


def test_an_answer_of_unknown_words_does_not_come_back():
    words = {"[UNK]": 0, "</s>": 1, "Hi": 2, "Hello": 3, "!": 4, "###": 5, ":": 6, "User": 7, "Assistant": 8}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>")
    tokenizer.chat_template = FAMILIES["plain"].template
    for said, fault in (("Hello!", None), ("Grüezi!", "answer 2 does not come back from its tokens: 'Grüezi!'")):
        messages = conversation([("Hi", "Hello!"), ("Hi", said)])
        assert round_trip_fault(tokenizer, messages, None, encoded(tokenizer, messages).input_ids) == fault
