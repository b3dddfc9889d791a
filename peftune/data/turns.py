"""The turns of a conversation, as their author wrote them -> as chat templates read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from peftune.data.targets import RowFault
from peftune.data.values import kind_of, text_of

Turn = dict[str, Any]
MESSAGES, SHAREGPT = ("role", "content"), ("from", "value")
"""The two ways to name the role and the text of a turn."""

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
         "model": "assistant", "bot": "assistant", "system": "system", "developer": "system",
         "tool": "tool", "function": "tool", "observation": "tool", "function_call": "assistant"}


def turns_of(values: Mapping[str, Any], key: str, usual: tuple[str, str] = MESSAGES) -> list[Turn]:
    """The conversation in a column, each turn with `role`, `content` and what else it has.

    Args:
        values: of the row.
        key: the column.
        usual: how its turns name role and text; the other way is read too.

    Raises:
        RowFault: it is no list of such turns.
    """
    turns = values.get(key)
    if not isinstance(turns, list) or not turns:
        role, content = usual
        said = "missing" if key not in values else f"{kind_of(turns) if turns != [] else 'empty'}, not a list of turns"
        raise RowFault(f"{key} is {said}",
                       f'write [{{"{role}": "user", "{content}": "..."}}, ...]')
    first = turns[0] if isinstance(turns[0], Mapping) else {}
    names = next((names for names in (usual, MESSAGES, SHAREGPT) if names[0] in first), usual)
    return [_turn(turn, number, key, names) for number, turn in enumerate(turns, start=1)]


def _turn(turn: Any, number: int, key: str, names: tuple[str, str]) -> Turn:
    role, content = names
    if not isinstance(turn, Mapping) or role not in turn:
        raise RowFault(f"turn {number} of {key} is no record with {role} and {content}", "mend the turn")
    name = ROLES.get(turn[role]) if isinstance(turn[role], str) else None
    if name is None:
        raise RowFault(f"turn {number} has the unknown role {turn[role]!r:.40}", f"use one of {', '.join(ROLES)}")
    said, calls = turn.get(content), turn.get("tool_calls")
    said = _joined(said, f"turn {number} of {key}: {content}") if isinstance(said, list) else said
    if not isinstance(said, str) and not (said is None and calls):
        raise RowFault(f"turn {number} of {key}: {content} is {kind_of(said)}, not a text", "write a text")
    if turn.get("weight") not in (None, 0, 1):
        raise RowFault(f"turn {number} of {key}: weight is {turn['weight']!r:.40}",
                       "write 1, or 0 for a turn that is read and not learned")
    if turn[role] == "function_call":
        said, calls = "", _written_calls(said, f"turn {number} of {key}: {content}")
    others = {k: v for k, v in turn.items() if k not in (*names, "tool_calls") and v is not None}
    if calls is not None:
        others["tool_calls"] = [_call(call, number) for call in calls] if isinstance(calls, list) else calls
    return {"role": name, "content": said or "", **others}


def _joined(parts: list[Any], place: str) -> str:
    """The text of a content in parts, as OpenAI writes them: one behind the other, with nothing between."""
    for number, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else None
            said = f"of type {kind!r:.40}" if kind not in (None, "text") else "no record of a text"
            raise RowFault(f"{place}[{number}] is {said}, and only text is read",
                           'write {"type": "text", "text": "..."}')
    return "".join(part["text"] for part in parts)


def is_conversation(values: Mapping[str, Any]) -> bool:
    """Whether a prompt is one of a chat: it is written as turns, or is a text beside a column `system`.

    An empty cell counts: of a file with such a column all rows are to be rendered alike.
    """
    return isinstance(values.get("prompt"), list) or "system" in values


def prompt_turns(values: Mapping[str, Any]) -> list[Turn]:
    """The turns of a prompt, of which a text is the user's; behind the column `system`.

    Raises:
        RowFault: it is neither a list of turns nor a text.
    """
    if isinstance(values.get("prompt"), list):
        return with_system(values, turns_of(values, "prompt"))
    said = text_of(values, "prompt", empty=True)
    return with_system(values, [{"role": "user", "content": said}] if said.strip() else [])


def is_learned(turn: Mapping[str, Any]) -> bool:
    """Whether it is the assistant's, and its weight, as OpenAI's rows have it, is not 0."""
    return turn["role"] == "assistant" and turn.get("weight", 1) != 0


def read_alone(turns: Sequence[Turn]) -> list[Turn]:
    """The turns of a prompt: the assistant's among them are read, and not learned."""
    return [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in turns]


def with_system(values: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    """The turns, behind what the column `system` says, unless they begin with it themselves.

    Raises:
        RowFault: it says what is no text.
    """
    system = text_of(values, "system", empty=True) if values.get("system") is not None else ""
    if not system.strip():
        return turns
    first = {"role": "system", "content": system}
    return turns if turns[:1] == [first] else [first, *turns]


def _call(call: Any, number: int) -> Any:
    """A call whose arguments are a record: OpenAI writes them as a JSON text, which templates would quote again."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    written = function["arguments"]
    try:
        arguments = json.loads(written) if written.strip() else {}
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RowFault(f"turn {number} calls a tool with arguments that are no JSON record: {written!r:.40}",
                       'write {"name": value, ...}, as a record or as a text')
    return {**call, "function": {**function, "arguments": arguments}}


def _written_calls(said: str | None, place: str) -> list[Any]:
    """The calls that LLaMA-Factory's turns of `function_call` hold as JSON: one record, or a list of them."""
    try:
        written = json.loads(said or "")
    except (ValueError, RecursionError):
        written = None
    calls = written if isinstance(written, list) else [written]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str)
                            and isinstance(call.get("arguments", {}), Mapping | str) for call in calls):
        raise RowFault(f"{place} is no call of a function: {said!r:.40}", 'write {"name": "...", "arguments": {...}}')
    return [{"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
            for call in calls]


def tools_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The functions that may be called: a list of records, or that list as a JSON text."""
    tools, mend = values.get("tools"), 'write [{"type": "function", "function": {...}}], or leave tools out'
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise RowFault("tools is a text that is no JSON", mend) from None
    elif isinstance(tools, str | None):
        tools = []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowFault("tools is no list of records", mend)
    return {"tools": tools} if tools else {}
