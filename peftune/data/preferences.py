"""Pairs of answers, in the shapes that preference sets have: the prompt, the chosen and the rejected one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from peftune.data.targets import RowFault
from peftune.data.turns import Turn, is_conversation, prompt_turns, tools_of, turns_of, with_system
from peftune.data.values import text_of

Answer = str | list[Turn]
"""An answer: what the assistant said, or its turns where they are several, or call tools."""

SPEAKER = re.compile(r"(?im)(?:^[^\w\n]*|[>|\]])(human|user|assistant|model)(?=[:<|>\]\n])")
"""Who speaks, in a dialogue that is one text: `Assistant:`, `### User:`, `<|im_start|>assistant`."""
OTHER_PROMPTS = ("messages", "conversations")
BOUNDARY = re.compile(r"\s+")


def preference_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt, as text or as a conversation, with a chosen and a rejected answer.

    Answers may be whole conversations, as preference sets have them: then what both begin with is the prompt.

    Raises:
        RowFault: an answer is missing, both are the same, or they answer no common prompt.
    """
    sides = [values.get(key) for key in ("chosen", "rejected")]
    if all(isinstance(side, list | Mapping) for side in sides):
        fields = _of_conversations(values)
    else:
        fields = _of_texts(values, text_of(values, "chosen"), text_of(values, "rejected"))
    if _said(fields["chosen"]) == _said(fields["rejected"]):
        raise RowFault("chosen and rejected are the same", "mend one of them, or delete the row")
    return {**fields, **tools_of(values)}


def _said(answer: Answer) -> Answer:
    return answer.strip() if isinstance(answer, str) else answer


def _of_texts(values: Mapping[str, Any], chosen: str, rejected: str) -> dict[str, Any]:
    if all(values.get(key) is None for key in ("prompt", *OTHER_PROMPTS)) and "system" not in values:
        cut = _shared_length(chosen, rejected)
        return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}
    return {**_prompt(values), "chosen": chosen, "rejected": rejected}


def _shared_length(chosen: str, rejected: str) -> int:
    """Characters of the dialogue that both texts begin with, cut where a word ends; a blank there begins the answers.

    Raises:
        RowFault: they are no dialogues, or differ before the assistant's last turn.
    """
    if chosen.strip() == rejected.strip():
        raise RowFault("chosen and rejected are the same", "mend one of them, or delete the row")
    shared = chosen[:_alike(chosen, rejected)]
    ends = [match.end() - match.group().endswith(" ") for match in BOUNDARY.finditer(shared)
            if chosen[match.end():].strip() and rejected[match.end():].strip()]
    cut = max(ends, default=0)
    speakers = [found.lower() for found in SPEAKER.findall(shared)]
    if not cut or not speakers or speakers[-1] not in ("assistant", "model"):
        raise RowFault("the key prompt is missing, and chosen and rejected are no dialogues that share one",
                       "add prompt, or name its column with data.columns={prompt: NAME}")
    if SPEAKER.search(chosen, len(shared)) or SPEAKER.search(rejected, len(shared)):
        raise RowFault("chosen and rejected differ before their last turn", "give both the same prompt")
    return cut


def _prompt(values: Mapping[str, Any]) -> dict[str, Any]:
    """The turns, or the text, that both answers answer."""
    key = _prompt_column(values)
    if key != "prompt":
        return {"messages": with_system(values, turns_of(values, key))}
    if is_conversation(values):
        return {"messages": prompt_turns(values)}
    return {"prompt": text_of(values, "prompt", empty=True)}


def _prompt_column(values: Mapping[str, Any]) -> str:
    return next((key for key in ("prompt", *OTHER_PROMPTS) if values.get(key) not in (None, "")), "prompt")


def _of_conversations(values: Mapping[str, Any]) -> dict[str, Any]:
    sides = {key: turns_of({key: [values[key]] if isinstance(values[key], Mapping) else values[key]}, key)
             for key in ("chosen", "rejected")}
    for key, turns in sides.items():
        last = turns[-1]
        if last["role"] != "assistant" or not (last["content"].strip() or last.get("tool_calls")):
            raise RowFault(f"{key} does not end in an answer of the assistant", "add it, or delete the row")
    shared = _alike(sides["chosen"][:-1], sides["rejected"][:-1])
    if any(turns[shared]["role"] != "assistant" for turns in sides.values()):
        raise RowFault("chosen and rejected differ before the assistant answers", "give both the same prompt")
    prompt = with_system(values, _with_prompt(values, sides["chosen"][:shared]))
    return {"messages": prompt, **{key: _answer(turns[shared:]) for key, turns in sides.items()}}


def _alike(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many members both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _answer(turns: list[Turn]) -> Answer:
    said: str = turns[0]["content"]
    return said if len(turns) == 1 and turns[0].keys() == {"role", "content"} else turns


def _with_prompt(values: Mapping[str, Any], shared: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What both answers share, after those turns of the prompt that it does not hold itself."""
    key = "prompt" if shared else _prompt_column(values)
    prompt = values.get(key)
    if prompt in (None, ""):
        return shared
    if isinstance(prompt, list):
        before = turns_of(values, key)
        if shared[: len(before)] == before:
            return shared
        if shared and before[-len(shared):] == shared:
            return before
        if not shared or shared[0]["role"] != before[-1]["role"]:
            return [*before, *shared]
    else:
        text = text_of(values, key)
        if not shared:
            return [{"role": "user", "content": text}]
        said = [turn["content"].strip() for turn in shared if turn["role"] == "user"]
        if any(content and (content in text or text.strip() in content) for content in said):
            return shared
    raise RowFault("prompt is not what chosen and rejected begin with", "mend the prompt, or leave it out")
