"""Which tokens of a conversation are learned, against masks written by hand."""

import itertools

import pytest
from transformers import AutoTokenizer

from peftune.config.schema import DataConfig
from peftune.data.chat import CHATML, TemplateMismatch, assistant_spans, choose_template
from peftune.data.formats import Found, canonical_rows
from peftune.data.rows import RawRow, Row
from peftune.data.targets import RowFault, Targets
from peftune.errors import ConfigError
from peftune.numerics.losses import IGNORE
from peftune.tasks.causal_lm import CAUSAL_LM, encode, encode_prompt
from peftune.tasks.task import TextEncoder

LLAMA3 = (
    "{{ '<s>' }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ '<s>' }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
THINKING = (  # like Qwen3: the last answer is rendered with an empty thinking block, earlier ones are not
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDS = {"chatml": (CHATML, "<|im_end|>\n"), "llama3": (LLAMA3, "<|eot_id|>"), "gemma": (GEMMA, "<end_of_turn>\n"),
        "thinking": (THINKING, "<|im_end|>\n")}


@pytest.fixture
def tokenizer(decoder):
    return AutoTokenizer.from_pretrained(decoder)


def conversation(turns, system):
    messages = [{"role": "system", "content": "Be brief."}] if system else []
    for turn in range(turns):
        messages += [{"role": "user", "content": f"question {turn}"}, {"role": "assistant", "content": f"reply {turn}"}]
    return messages


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("turns", [1, 2, 5])
@pytest.mark.parametrize("name", ENDS)
def test_the_learned_text_is_each_answer_with_its_end_mark(tokenizer, name, turns, system):
    tokenizer.chat_template, end = ENDS[name]
    whole, spans = assistant_spans(tokenizer, conversation(turns, system), None)
    expected = [f"reply {turn}{end}" for turn in range(turns)]
    if name == "thinking":
        expected[-1] = "<think>\n\n</think>\n\n" + expected[-1]
    assert [whole[begin:after] for begin, after in spans] == expected


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(TemplateMismatch):
        assistant_spans(tokenizer, conversation(2, False), None)


def supervised_text(tokenizer, example):
    return tokenizer.decode([token for token in example.targets if token != IGNORE])


def encoded_all(tokenizer, fields, max_length=200, **data):
    row = Row(fields, "f", 1, "0")
    return encode(row, Targets("next_token"), TextEncoder(tokenizer, max_length, DataConfig(train="x", **data)))


def encoded(tokenizer, fields, max_length=200, **data):
    (example,) = encoded_all(tokenizer, fields, max_length, **data)
    return example


def test_a_completion_is_learned_with_the_end_of_text_and_the_prompt_is_not(tokenizer):
    example = encoded(tokenizer, {"prompt": "the printer", "completion": " is broken"})
    assert supervised_text(tokenizer, example) == " is broken</s>"
    assert example.num_targets == sum(token != IGNORE for token in example.targets)
    prompt = list(example.input_ids[: example.record["prompt_length"]])
    assert tokenizer.decode(prompt, skip_special_tokens=True) == "the printer"
    assert example.record["reference"] == "is broken"


def test_the_end_of_text_is_learned_also_where_it_is_the_padding_token(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for fields in ({"text": "the printer"}, {"prompt": "a", "completion": "b"},
                   {"messages": conversation(1, False)}):
        choose_template(tokenizer, "plain")
        example = encoded(tokenizer, fields)
        assert example.input_ids[-1] == tokenizer.eos_token_id == example.targets[-1]


def test_nothing_after_the_end_of_text_of_an_answer_is_learned(tokenizer):
    choose_template(tokenizer, "plain")
    example = encoded(tokenizer, {"messages": conversation(2, False)})
    assert supervised_text(tokenizer, example) == "reply 0</s>reply 1</s>"


def test_a_template_without_end_of_text_gets_one_after_the_last_answer(tokenizer):
    choose_template(tokenizer, "chatml")
    example = encoded(tokenizer, {"messages": conversation(2, True)})
    assert supervised_text(tokenizer, example) == "reply 0<|im_end|>\nreply 1<|im_end|>\n</s>"


def test_train_on_all_learns_every_token(tokenizer):
    example = encoded(tokenizer, {"prompt": "the printer", "completion": " is broken"}, train_on="all")
    assert list(example.targets) == list(example.input_ids)


def test_plain_text_has_no_answer_to_generate(tokenizer):
    example = encoded(tokenizer, {"text": "the printer is broken"})
    assert example.record["reference"] is None and example.num_targets == len(example.input_ids) - 1


def test_a_cut_example_says_its_full_length_and_may_have_no_target_left(tokenizer):
    example = encoded(tokenizer, {"prompt": "the printer " * 9, "completion": "x"}, max_length=4)
    assert len(example.input_ids) == 4 and example.full_length > 4 and example.num_targets == 0


def test_a_prompt_to_continue_equals_the_prompt_that_was_trained_on(tokenizer):
    choose_template(tokenizer, "plain")
    text = TextEncoder(tokenizer, 200, DataConfig(train="x"))
    example = encoded(tokenizer, {"messages": conversation(2, True)})
    (prompt,) = encode_prompt({"messages": conversation(2, True)}, text)
    assert list(prompt.input_ids) == list(example.input_ids[: example.record["prompt_length"]])
    with pytest.raises(RowFault):
        encode_prompt({"label": 3}, text)


@pytest.mark.parametrize(("row", "format"), [
    ({"prompt": "last question", "prompt_id": "0", "messages": conversation(2, True)}, "messages"),
    ({"instruction": "name it", "input": "printer", "output": "it", "text": "### name it ### it"}, "alpaca"),
    ({"system": "be brief", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
     "sharegpt"),
    ({"prompt": "the printer", "completion": " is broken", "instruction": "look"}, "prompt_completion"),
])
def test_a_prompt_is_read_as_the_training_row_was_whatever_other_columns_there_are(tokenizer, row, format):
    choose_template(tokenizer, "plain")
    found = Found()
    (trained,) = canonical_rows([RawRow(row, "f", 1)], format="auto", accepts=CAUSAL_LM.formats, columns={}, source=0,
                                numbers=itertools.count(), found=found)
    assert found.formats == {"f": format}
    example = encoded(tokenizer, trained.fields)
    without = {key: value for key, value in row.items() if key not in ("output", "completion")}
    for record in (row, without) if format != "prompt_completion" else (row,):
        (prompt,) = encode_prompt(record, TextEncoder(tokenizer, 200, DataConfig(train="x")))
        assert list(prompt.input_ids) == list(example.input_ids[: example.record["prompt_length"]])


def test_the_format_of_the_run_decides_which_prompt_is_read(tokenizer):
    choose_template(tokenizer, "plain")
    row = {"messages": conversation(1, False), "prompt": "the printer", "text": "the badge"}

    def read(format):
        (prompt,) = encode_prompt(row, TextEncoder(tokenizer, 200, DataConfig(train="x", format=format)))
        return tokenizer.decode(prompt.input_ids)

    assert read("prompt_completion") == "the printer" and read("text") == "the badge"
    assert read("alpaca") == read("auto") != "the printer"


@pytest.mark.parametrize(("record", "said"), [
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "turn 1 of messages: content[0] is no record of a text"),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role 'narrator'"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages holds no turn before"),
    ({"prompt": ["hi"]}, "turn 1 of prompt is no record with role and content"),
])
def test_a_broken_prompt_is_said_to_be_broken_and_not_to_be_missing(tokenizer, record, said):
    with pytest.raises(RowFault) as caught:
        encode_prompt(record, TextEncoder(tokenizer, 200, DataConfig(train="x")))
    assert said in caught.value.message


def test_plain_text_that_is_split_predicts_every_token_once(tokenizer):
    text = {"text": "the printer is broken and the password was lost " * 4}
    whole = encoded(tokenizer, text)
    pieces = encoded_all(tokenizer, text, max_length=16, too_long="split")
    predicted = [token for piece in pieces for token in piece.targets[1:]]
    assert predicted == list(whole.targets[1:]) and len(pieces) > 2
    assert all(len(piece.input_ids) <= 16 for piece in pieces)
    assert sum(piece.num_targets for piece in pieces) == whole.num_targets
    assert len({piece.record["id"] for piece in pieces}) == len(pieces)


def test_template_names_files_and_jinja_text_are_told_apart(tokenizer, tmp_path):
    assert "plain" in choose_template(tokenizer, None)
    assert choose_template(tokenizer, None) == "the tokenizer's own"
    (tmp_path / "t.jinja").write_text(CHATML)
    choose_template(tokenizer, str(tmp_path / "t.jinja"))
    assert tokenizer.chat_template == CHATML
    with pytest.raises(ConfigError):
        choose_template(tokenizer, "chatmll")
    assert DataConfig(train="x").chat_template is None
