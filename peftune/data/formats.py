"""Raw rows -> canonical rows. The format is found from the columns, once a file, and said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from peftune.data.rows import RawRow, Row
from peftune.errors import DataError, Fault

Fields = dict[str, Any]

COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
}
"""Columns a format needs, in the order in which `auto` tries them."""

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "text": ("sentence", "content", "review", "query", "utterance", "premise", "document"),
    "label": ("labels", "intent", "category", "class", "sentiment", "target", "score"),
    "prompt": ("question", "input", "query", "instruction"),
    "completion": ("answer", "response", "output", "chosen"),
    "messages": ("conversation", "chat", "dialog", "dialogue"),
}

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
         "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "function": "tool",
         "observation": "tool"}


class _BadRow(Exception):
    """A row that does not fit its format: message and mend."""

    def __init__(self, message: str, mend: str) -> None:
        super().__init__(message)
        self.message, self.mend = message, mend


@dataclass(slots=True)
class Found:
    """What the reader decided: format of each file, and faults by row."""

    formats: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def canonical_rows(
    raw_rows: Iterable[RawRow], *, format: str, accepts: tuple[str, ...], columns: Mapping[str, str], source: int,
    first_id: int, found: Found,
) -> Iterator[Row]:
    """Yield the canonical form of each row; what does not fit goes to `found.faults`.

    Args:
        raw_rows: rows of one source.
        format: a format's name, or auto.
        accepts: formats that the task can learn from.
        columns: renames, {expected name: name in the file}.
        source: position of the source, kept with the row.
        first_id: number of the first row, where rows have no `id` of their own.
        found: receives the format of each file and the faults.

    Raises:
        DataError: no accepted format has its columns in a file.
    """
    for number, raw in enumerate(raw_rows, start=first_id):
        values = _renamed(raw, columns)
        if raw.file not in found.formats:
            found.formats[raw.file] = _format_of(raw, values, format, accepts)
        try:
            fields = _CANONICAL[found.formats[raw.file]](values)
            _refuse_surrogates(fields)
        except _BadRow as bad:
            found.faults.append(Fault(kind="data", file=raw.file, line=raw.line, message=bad.message, mend=bad.mend))
            continue
        own_id = values.get("id")
        yield Row(fields, raw.file, raw.line, str(number if own_id is None else own_id), source)


def _renamed(raw: RawRow, columns: Mapping[str, str]) -> dict[str, Any]:
    values = dict(raw.values)
    for expected, given in columns.items():
        if given in raw.values:
            values[expected] = raw.values[given]
    return values


def _format_of(raw: RawRow, values: Mapping[str, Any], format: str, accepts: tuple[str, ...]) -> str:
    candidates = [name for name in COLUMNS if name in accepts] if format == "auto" else [format]
    for name in candidates:
        if all(column in values for column in COLUMNS[name]):
            return name
    needs = "; ".join(f"{name}: {', '.join(COLUMNS[name])}" for name in candidates)
    renames = [f"data.columns={{{expected}: {other}}}" for expected, others in OTHER_NAMES.items()
               for other in others if other in values and expected not in values
               and any(expected in COLUMNS[name] for name in candidates)]
    raise DataError(Fault(
        kind="data", file=raw.file, line=raw.line,
        message=f"columns {', '.join(map(str, values)) or 'none'} fit no format of this task ({needs})",
        mend=f"perhaps {' or '.join(renames[:3])}" if renames else "rename them with data.columns={expected: given}",
    ))


def _text(values: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    if key not in values:
        raise _BadRow(f"the key {key} is missing", f"add {key}, or delete the row")
    value = values[key]
    if not isinstance(value, str):
        raise _BadRow(f"{key} is {_kind(value)}, not a text", "write it in quotes, or delete the row")
    if not empty and not value.strip():
        raise _BadRow(f"{key} is empty", f"fill in {key}, or delete the row")
    return value


def _kind(value: object) -> str:
    names = {type(None): "null", list: "a list", dict: "a record", bool: "true or false"}
    return names.get(type(value), f"the number {value!r:.40}" if isinstance(value, int | float) else "not text")


def _refuse_surrogates(fields: Any) -> None:
    """Half a surrogate pair is valid JSON and no valid text: tokenizers and files refuse it."""
    if isinstance(fields, str):
        try:
            fields.encode("utf-8")
        except UnicodeEncodeError:
            raise _BadRow("the text holds half a surrogate pair", "mend the escape \\uD800..\\uDFFF") from None
    elif isinstance(fields, Mapping):
        for value in fields.values():
            _refuse_surrogates(value)
    elif isinstance(fields, list):
        for value in fields:
            _refuse_surrogates(value)


def _classification(values: Mapping[str, Any]) -> Fields:
    if "label" not in values:
        raise _BadRow("the key label is missing", "add label, or delete the row")
    label = values["label"]
    members = label if isinstance(label, list) else [label]
    if not all(isinstance(member, str | int | float) for member in members) or label == "":
        raise _BadRow(f"label is {_kind(label)}", "write a name, a number, or a list of names")
    pair = _text(values, "text_pair", empty=True) if values.get("text_pair") is not None else None
    return {"text": _text(values, "text"), "text_pair": pair, "label": label}


def _plain_text(values: Mapping[str, Any]) -> Fields:
    return {"text": _text(values, "text")}


def _prompt_completion(values: Mapping[str, Any]) -> Fields:
    return {"prompt": _text(values, "prompt", empty=True), "completion": _text(values, "completion")}


def _alpaca(values: Mapping[str, Any]) -> Fields:
    extra = _text(values, "input", empty=True) if values.get("input") is not None else ""
    instruction = _text(values, "instruction")
    system = _text(values, "system", empty=True) if values.get("system") is not None else ""
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": _text(values, "output")}]
    return {"messages": ([{"role": "system", "content": system}] if system.strip() else []) + messages}


def _messages(values: Mapping[str, Any]) -> Fields:
    return _conversation(values, "messages", role="role", content="content")


def _sharegpt(values: Mapping[str, Any]) -> Fields:
    system = values.get("system")
    fields = _conversation(values, "conversations", role="from", content="value")
    if isinstance(system, str) and system.strip():
        fields["messages"].insert(0, {"role": "system", "content": system})
    return fields


def _turns(values: Mapping[str, Any], key: str, *, role: str, content: str) -> list[dict[str, Any]]:
    turns = values.get(key)
    if not isinstance(turns, list) or not turns:
        raise _BadRow(f"{key} is {_kind(turns) if turns != [] else 'empty'}, not a list of turns",
                      f'write [{{"{role}": "user", "{content}": "..."}}, ...]')
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or role not in turn:
            raise _BadRow(f"turn {number} of {key} is no record with {role} and {content}", "mend the turn")
        name = ROLES.get(turn[role]) if isinstance(turn[role], str) else None
        if name is None:
            raise _BadRow(f"turn {number} has the unknown role {turn[role]!r:.40}", f"use one of {', '.join(ROLES)}")
        said = turn.get(content)
        calls = turn.get("tool_calls")
        if not isinstance(said, str) and not (said is None and calls):
            raise _BadRow(f"turn {number} of {key}: {content} is {_kind(said)}, not a text", "write a text")
        others = {k: v for k, v in turn.items() if k not in (role, content) and v is not None}
        messages.append({"role": name, "content": said or "", **others})
    return messages


def _conversation(values: Mapping[str, Any], key: str, *, role: str, content: str) -> Fields:
    messages = _turns(values, key, role=role, content=content)
    if not any(message["role"] == "assistant" and (message["content"].strip() or message.get("tool_calls"))
               for message in messages):
        raise _BadRow("no assistant turn to learn from", "add one, or delete the row")
    tools = values.get("tools")
    return {"messages": messages, **({"tools": tools} if isinstance(tools, list) and tools else {})}


_CANONICAL: dict[str, Callable[[Mapping[str, Any]], Fields]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "classification": _classification,
    "text": _plain_text,
}


PROMPT_COLUMNS = ("prompt", "messages", "conversations", "instruction", "text")
"""Columns that `peftune predict` generates from."""


def prompt_messages(values: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The conversation to continue, without the answer it may end in; None where the record holds none."""
    try:
        if "instruction" in values:
            messages = _alpaca({**values, "output": "-"})["messages"]
        elif "messages" in values or "conversations" in values:
            key, role, content = (("messages", "role", "content") if "messages" in values
                                  else ("conversations", "from", "value"))
            messages = _turns(values, key, role=role, content=content)
        else:
            return None
    except _BadRow:
        return None
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages or None
