"""What a row of each format must hold, and its canonical fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from peftune.data.preferences import preference_fields
from peftune.data.targets import RowFault
from peftune.data.turns import (
    SHAREGPT,
    Turn,
    is_conversation,
    is_learned,
    prompt_turns,
    read_alone,
    tools_of,
    turns_of,
    with_system,
)
from peftune.data.values import kind_of, text_of

Fields = dict[str, Any]


def class_names(label: Any) -> list[str]:
    """The classes of a label, or of a list of labels: true and 1.0 are written as in JSON, without the fraction."""
    return [_class_name(member) for member in (label if isinstance(label, list) else [label])]


def _class_name(label: object) -> str:
    if isinstance(label, bool):
        return "true" if label else "false"
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def refuse_surrogates(fields: Any) -> None:
    """Half a surrogate pair is valid JSON and no valid text: tokenizers and files refuse it."""
    if isinstance(fields, str):
        try:
            fields.encode("utf-8")
        except UnicodeEncodeError:
            raise RowFault("the text holds half a surrogate pair", "mend the escape \\uD800..\\uDFFF") from None
    elif isinstance(fields, Mapping):
        for value in fields.values():
            refuse_surrogates(value)
    elif isinstance(fields, list):
        for value in fields:
            refuse_surrogates(value)


def _classification(values: Mapping[str, Any]) -> Fields:
    if "label" not in values:
        raise RowFault("the key label is missing", "add label, or delete the row")
    label = values["label"]
    members = label if isinstance(label, list) else [label]
    if not all(isinstance(member, str | int | float) for member in members) or label == "":
        kind = "empty" if label == "" else kind_of(label)
        raise RowFault(f"label is {kind}", "write a name, a number, or a list of names")
    if any(isinstance(member, float) and not math.isfinite(member) for member in members):
        raise RowFault(f"label is {label!r:.40}: not a finite number", "write a finite number, or delete the row")
    pair = text_of(values, "text_pair", empty=True) if values.get("text_pair") is not None else None
    return {"text": text_of(values, "text"), "text_pair": pair, "label": label}


def _plain_text(values: Mapping[str, Any]) -> Fields:
    return {"text": text_of(values, "text")}


def _prompt_completion(values: Mapping[str, Any]) -> Fields:
    if is_conversation(values):
        return _completed_conversation(values)
    return {"prompt": text_of(values, "prompt", empty=True), "completion": text_of(values, "completion")}


def _completed_conversation(values: Mapping[str, Any]) -> Fields:
    """A conversation of which the turns of the prompt are read, and not learned."""
    if isinstance(values.get("completion"), list):
        said = turns_of(values, "completion")
    else:
        said = [{"role": "assistant", "content": text_of(values, "completion")}]
    return _answered({"messages": [*read_alone(prompt_turns(values)), *said], **tools_of(values)})


def _alpaca(values: Mapping[str, Any]) -> Fields:
    extra = text_of(values, "input", empty=True) if values.get("input") is not None else ""
    instruction = text_of(values, "instruction")
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    turns = [*_history(values), {"role": "user", "content": question},
             {"role": "assistant", "content": text_of(values, "output")}]
    return {"messages": with_system(values, turns)}


def _history(values: Mapping[str, Any]) -> list[Turn]:
    """Earlier turns: LLaMA-Factory's column of pairs of an instruction and its answer."""
    pairs = values.get("history")
    pairs = [] if pairs in (None, "") else pairs
    if not isinstance(pairs, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(said, str) for said in pair)
            for pair in pairs):
        raise RowFault("history is no list of pairs of texts", 'write [["question", "answer"], ...], or leave it out')
    return [{"role": role, "content": said}
            for pair in pairs for role, said in zip(("user", "assistant"), pair, strict=True)]


def _messages(values: Mapping[str, Any]) -> Fields:
    return _answered(_messages_said(values))


def _messages_said(values: Mapping[str, Any]) -> Fields:
    return {"messages": with_system(values, turns_of(values, "messages")), **tools_of(values)}


def _sharegpt(values: Mapping[str, Any]) -> Fields:
    return _answered(_sharegpt_said(values))


def _sharegpt_said(values: Mapping[str, Any]) -> Fields:
    return {"messages": with_system(values, turns_of(values, "conversations", SHAREGPT)), **tools_of(values)}


def _prompt_said(values: Mapping[str, Any]) -> Fields:
    return {"messages": prompt_turns(values), **tools_of(values)}


def _answered(fields: Fields) -> Fields:
    if not any(is_learned(message) and (message["content"].strip() or message.get("tool_calls"))
               for message in fields["messages"]):
        raise RowFault("no assistant turn to learn from", "add one, or delete the row")
    return fields


def _ner(values: Mapping[str, Any]) -> Fields:
    words, tags = values.get("tokens"), values.get("ner_tags")
    for key, value, kinds in (("tokens", words, str), ("ner_tags", tags, str | int)):
        if not isinstance(value, list) or not value:
            raise RowFault(f"{key} is {kind_of(value) if value != [] else 'empty'}, not a list",
                           'write {"tokens": ["...", ...], "ner_tags": ["O", ...]}')
        odd = next((n for n, member in enumerate(value) if not isinstance(member, kinds)
                    or isinstance(member, bool)), None)
        if odd is not None:
            raise RowFault(f"{key}[{odd}] is {kind_of(value[odd])}", "write one word and one tag a position")
    assert isinstance(words, list) and isinstance(tags, list)
    if len(words) != len(tags):
        raise RowFault(f"{len(words)} tokens and {len(tags)} tags", "write one tag for each token")
    below = next((n for n, tag in enumerate(tags) if isinstance(tag, int) and tag < 0), None)
    if below is not None:
        raise RowFault(f"ner_tags[{below}] is {tags[below]}: numbers of tags begin at 0",
                       "give each word its tag, O where it is outside; no tag is ignored, -100 neither")
    blank = next((n for n, word in enumerate(words) if not word.strip()), None)
    if blank is not None:
        raise RowFault(f"tokens[{blank}] is blank", "delete it and its tag")
    return {"tokens": words, "tags": tags}


def _squad(values: Mapping[str, Any]) -> Fields:
    context, given = text_of(values, "context"), values.get("answers")
    if isinstance(given, Mapping):  # the columns of hub data sets
        texts, starts = given.get("text"), given.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise RowFault("answers has no text and answer_start of equal length",
                           'write {"text": ["..."], "answer_start": [0]}')
        given = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if values.get("is_impossible"):
        given = []
    elif given is None:
        mend = "data.columns={answers: answer}" if "answer" in values else "add answers, [] where the context has none"
        raise RowFault(f"answers is {'null' if 'answers' in values else 'missing'}", mend)
    if not isinstance(given, list):
        raise RowFault(f"answers is {kind_of(given)}", 'write [{"text": "...", "answer_start": 0}]')
    return {"question": text_of(values, "question"), "context": context,
            "answers": [_answer(answer, context) for answer in given]}


def _answer(answer: Any, context: str) -> Fields:
    text, start = (answer.get("text"), answer.get("answer_start")) if isinstance(answer, Mapping) else (None, None)
    if not isinstance(text, str) or not text or not isinstance(start, int):
        raise RowFault(f"the answer {answer!r:.60} has no text and answer_start",
                       'write {"text": "...", "answer_start": 0}')
    if context[start : start + len(text)] != text or start < 0:
        at = context.find(text)
        mend = f"it stands at {at}: answer_start={at}" if at >= 0 else "mend the answer or the context"
        raise RowFault(f"the answer {text!r:.60} does not stand in the context at {start}", mend)
    return {"text": text, "start": start}


CANONICAL: dict[str, Callable[[Mapping[str, Any]], Fields]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "classification": _classification,
    "text": _plain_text,
    "ner": _ner,
    "squad": _squad,
    "preference": preference_fields,
}
"""Format -> from a row's values to its canonical fields. Raises RowFault."""

PROMPT_COLUMNS = {"messages": "messages", "sharegpt": "conversations", "alpaca": "instruction",
                  "prompt_completion": "prompt", "text": "text"}
"""Format -> the column that `peftune predict` generates from."""


def prompt_fields(values: Mapping[str, Any], format: str) -> Fields:
    """The text to continue, or the conversation to continue, without the answer it may end in, and its tools.

    Raises:
        RowFault: the record does not hold what the format asks for, or nothing comes before the answer.
    """
    said = _prompt_said if is_conversation(values) else None
    said = {"messages": _messages_said, "sharegpt": _sharegpt_said, "prompt_completion": said}.get(format)
    if format == "alpaca":
        return {"messages": _alpaca({**values, "output": "-"})["messages"][:-1]}
    if said is None:
        return {"prompt": text_of(values, PROMPT_COLUMNS[format])}
    fields = said(values)
    while fields["messages"] and fields["messages"][-1]["role"] == "assistant":
        fields["messages"].pop()
    if not fields["messages"]:
        raise RowFault(f"{PROMPT_COLUMNS[format]} holds no turn before the assistant's answer",
                       "add a turn of the user")
    return fields
