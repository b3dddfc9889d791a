"""Pairs of whole dialogues, as turns or as one text each: what both begin with is the prompt."""

import pytest
from transformers import AutoTokenizer

from peftune.config.schema import DataConfig
from peftune.data.preferences import preference_fields
from peftune.data.rows import Row
from peftune.data.survey import Survey
from peftune.data.targets import RowFault, Targets
from peftune.numerics.losses import IGNORE
from peftune.tasks.preference import encode
from peftune.tasks.task import TextEncoder
from tests.templates import CALLING

HUMAN = "\n\nHuman: Which printer?\n\nAssistant: The new one.\n\nHuman: Where?\n\nAssistant:"


def turns(*said):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * len(said), said)]


@pytest.mark.parametrize(("prompt", "chosen", "rejected"), [
    (HUMAN, " On floor 2.", " No."),
    (HUMAN + " I think", " on floor 2.", " somewhere."),
    (HUMAN + " On", " floor 2.", " floors."),
    (HUMAN + " It is", " gone.", " gone. Sorry."),
    ("<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n", "On floor 2.<|im_end|>", "No.<|im_end|>"),
    ("### User:\nWhere?\n\n### Assistant:\n", "Yes", "No"),
    ("<start_of_turn>user\nWhere?<end_of_turn>\n<start_of_turn>model\n", "Here", "There"),
    ("<|start_header_id|>user<|end_header_id|>\n\nWhere?<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n", "Here", "There"),
])
def test_the_prompt_of_two_texts_is_what_they_begin_with_up_to_a_whole_word(prompt, chosen, rejected):
    fields = preference_fields({"chosen": prompt + chosen, "rejected": prompt + rejected})
    assert fields == {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(("chosen", "rejected", "why"), [
    ("I think it is on floor 2.", "I think it is gone.", "the key prompt is missing"),  # answers, not dialogues
    ("\n\nHuman: Where?\n\nAssistant: Here.", "\n\nHuman: When?\n\nAssistant: Now.", "the key prompt is missing"),
    (HUMAN + " Here.\n\nHuman: Thanks\n\nAssistant: Bye.", HUMAN + " There.\n\nHuman: Oh\n\nAssistant: Bye.", "differ"),
    (HUMAN + " Here.", HUMAN + " Here. ", "the same"),
])
def test_texts_that_share_no_dialogue_are_refused(chosen, rejected, why):
    with pytest.raises(RowFault, match=why):
        preference_fields({"chosen": chosen, "rejected": rejected})


def test_turns_that_both_begin_with_are_the_prompt_and_the_others_the_answers():
    chosen, rejected = turns("q", "a", "r", "good"), turns("q", "b", "s", "bad")
    fields = preference_fields({"chosen": chosen, "rejected": rejected})
    assert fields == {"messages": chosen[:1], "chosen": chosen[1:], "rejected": rejected[1:]}
    fields = preference_fields({"chosen": chosen, "rejected": [*chosen[:3], *rejected[3:]]})
    assert fields == {"messages": chosen[:3], "chosen": "good", "rejected": "bad"}
    fields = preference_fields({"chosen": turns("q", "a"), "rejected": chosen})
    assert fields == {"messages": turns("q"), "chosen": "a", "rejected": chosen[1:]}


def test_conversations_that_part_at_a_turn_of_the_user_are_refused():
    with pytest.raises(RowFault, match="differ before the assistant answers"):
        preference_fields({"chosen": turns("q", "a", "r", "c"), "rejected": turns("q", "a", "s", "d")})


def test_an_answer_may_call_a_tool():
    rejected = turns("Where is p2?", "No idea.")
    fields = preference_fields({"chosen": CALLING[:2], "rejected": rejected})
    assert fields == {"messages": CALLING[:1], "chosen": CALLING[1:2], "rejected": "No idea."}


def test_of_answers_of_several_turns_what_the_assistant_says_is_learned_and_surveyed(decoder):
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.chat_template = ("{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
                               "{% if add_generation_prompt %}assistant:\n{% endif %}")
    row = Row(preference_fields({"chosen": turns("q", "a", "r", "good", "t", "x"),
                                 "rejected": turns("q", "a", "r", "bad", "u", "y")}), "f", 1, "0")
    [example] = encode(row, Targets("preference", kind="pair"), TextEncoder(tokenizer, 400, DataConfig(train="f")))
    learned = [tokenizer.decode([target for target in list(example.targets)[part] if target != IGNORE])
               for part in (slice(0, example.first_part), slice(example.first_part, None))]
    assert learned == ["good</s>x</s>", "bad</s>y</s>"]
    assert example.record["prompt"] == "user: q\nassistant: a\nuser: r"
    assert example.record["chosen"] == "assistant: good\nuser: t\nassistant: x"
    survey = Survey("preference")
    survey.add("train", row)
    survey.add("train", row)
    assert [finding.kind for finding in survey.findings()] == ["exact_duplicate"]
