"""Pairs of answers, in the shapes that preference sets have: the prompt, the chosen and the rejected one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftune.data.targets import RowFault
from peftune.data.turns import is_conversation, prompt_turns, tools_of, turns_of, with_system
from peftune.data.values import text_of


def preference_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt, as text or as a conversation, with a chosen and a rejected answer.

    Answers may be whole conversations, as preference sets have them: then what both share is the prompt.

    Raises:
        RowFault: an answer is missing, or both are the same.
    """
    sides = [values.get(key) for key in ("chosen", "rejected")]
    if all(isinstance(side, list | Mapping) for side in sides):
        fields = _of_conversations(values)
    else:
        fields = {**_prompt(values), "chosen": text_of(values, "chosen"), "rejected": text_of(values, "rejected")}
    if fields["chosen"].strip() == fields["rejected"].strip():
        raise RowFault("chosen and rejected are the same", "mend one of them, or delete the row")
    return {**fields, **tools_of(values)}


def _prompt(values: Mapping[str, Any]) -> dict[str, Any]:
    """The turns, or the text, that both answers answer."""
    key = _prompt_column(values)
    if key != "prompt":
        return {"messages": with_system(values, turns_of(values, key))}
    if is_conversation(values):
        return {"messages": prompt_turns(values)}
    return {"prompt": text_of(values, "prompt", empty=True)}


def _prompt_column(values: Mapping[str, Any]) -> str:
    columns = ("prompt", "messages", "conversations")
    return next((key for key in columns if values.get(key) not in (None, "")), "prompt")


def _of_conversations(values: Mapping[str, Any]) -> dict[str, Any]:
    chosen, rejected = (turns_of({key: [values[key]] if isinstance(values[key], Mapping) else values[key]}, key)
                        for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise RowFault("chosen and rejected differ before their last turn", "give both the same prompt")
    for key, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
            raise RowFault(f"{key} does not end in an answer of the assistant", "add it, or delete the row")
    return {"messages": with_system(values, _with_prompt(values, chosen[:-1])), "chosen": chosen[-1]["content"],
            "rejected": rejected[-1]["content"]}


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
