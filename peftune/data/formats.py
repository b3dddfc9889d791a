"""Raw rows -> canonical rows. The format is found from the columns, once a file, and said."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftune.data.canonical import CANONICAL, PROMPT_COLUMNS, refuse_surrogates
from peftune.data.rows import Faults, RawRow, Row
from peftune.data.targets import RowFault
from peftune.errors import DataError, Fault

COLUMNS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "ner": ("tokens", "ner_tags"),
    "squad": ("question", "context"),
    "text": ("text",),
}
"""Columns a format needs, in the order in which `auto` tries them."""

ANSWERED = ("messages", "sharegpt", "alpaca", "prompt_completion")
"""Formats whose answers are all learned."""
MARKS = ("label", "kto_tag")
"""Usual names, of TRL and of LLaMA-Factory, of the mark by which KTO learns which answers are wanted
(arXiv:2402.01306)."""

LOOKED_AT = 100
"""Rows of a file from which its format is found."""

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "text": ("sentence", "content", "review", "query", "utterance", "premise", "document"),
    "label": ("labels", "intent", "category", "class", "sentiment", "target", "score"),
    "prompt": ("question", "instruction", "query", "input"),
    "completion": ("answer", "response", "output", "chosen"),
    "messages": ("conversation", "chat", "dialog", "dialogue"),
    "ner_tags": ("tags", "labels", "tag", "ner"),
    "tokens": ("words", "token"),
    "context": ("passage", "paragraph", "document"),
    "question": ("query",),
    "answers": ("answer",),
    "chosen": ("preferred", "accepted", "winner"),
    "rejected": ("dispreferred", "loser"),
    "output": ("response",),
    "input": ("context",),
    "system": ("system_prompt",),
}


@dataclass(slots=True)
class Found:
    """What the reader decided: format of each file, and faults by row; and which columns it has seen."""

    formats: dict[str, str] = field(default_factory=dict)
    columns: dict[str, None] = field(default_factory=dict)
    """Of the first rows of each file, and those of any row that `data.columns` renames."""
    faults: Faults = field(default_factory=Faults)


def canonical_rows(
    raw_rows: Iterable[RawRow], *, format: str, accepts: tuple[str, ...], columns: Mapping[str, str], source: int,
    numbers: Iterator[int], found: Found,
) -> Iterator[Row]:
    """Yield the canonical form of each row; what does not fit goes to `found.faults`.

    Args:
        raw_rows: rows of one source.
        format: a format's name, or auto.
        accepts: formats that the task can learn from.
        columns: renames, {expected name: name in the file}.
        source: position of the source, kept with the row.
        numbers: of the rows of this and other sources, which name those that have no `id` of their own.
        found: receives the format of each file and the faults.

    Raises:
        DataError: no accepted format has its columns in a file.
    """
    for file, rows in itertools.groupby(raw_rows, key=lambda raw: raw.file):
        first = [(raw, _renamed(raw, columns, found)) for raw in itertools.islice(rows, LOOKED_AT)]
        found.columns |= dict.fromkeys(name for raw, _ in first for name in raw.values)
        if file not in found.formats:
            found.formats[file] = _format_of(first, format, accepts)
        following = ((raw, _renamed(raw, columns, found)) for raw in rows)
        for raw, values in itertools.chain(first, following):
            row = _canonical_row(raw, values, found, source, next(numbers))
            if row is not None:
                yield row


def _canonical_row(
    raw: RawRow, values: Mapping[str, Any], found: Found, source: int, number: int
) -> Row | None:
    try:
        fields = CANONICAL[found.formats[raw.file]](values)
        refuse_surrogates([fields, str(values.get("id"))])
    except RowFault as bad:
        found.faults.add(Fault(kind="data", file=raw.file, line=raw.line, message=bad.message, mend=bad.mend))
        return None
    if found.formats[raw.file] in ANSWERED and any(str(raw.values.get(mark)).lower() == "false" for mark in MARKS):
        fields = {**fields, "unwanted": True}
    own_id = values.get("id")
    return Row(fields, raw.file, raw.line, str(number if own_id is None else own_id), source)


def _renamed(raw: RawRow, columns: Mapping[str, str], found: Found) -> dict[str, Any]:
    values = dict(raw.values)
    for expected, given in columns.items():
        if given in raw.values:
            values[expected] = raw.values[given]
            found.columns[given] = None
    return values


def useless_renames(columns: Mapping[str, str], found: Found) -> list[Fault]:
    """Renames of `data.columns` whose column no row has, once all rows are read."""
    return [Fault(kind="data", message=f"data.columns = {{{expected}: {given}}}: no row has a column {given}",
                  mend=f"leave {expected} out, or name a column that is there: {', '.join(list(found.columns)[:12])}")
            for expected, given in columns.items() if found.columns and given not in found.columns]


def _format_of(first: Sequence[tuple[RawRow, Mapping[str, Any]]], format: str, accepts: tuple[str, ...]) -> str:
    """The format that most of a file's first rows have the columns of: one broken row decides nothing."""
    candidates = [name for name in COLUMNS if name in accepts] if format == "auto" else [format]
    fitting = {name: sum(all(column in values for column in COLUMNS[name]) for _, values in first)
               for name in candidates}
    best = max(candidates, key=lambda name: fitting[name])
    if fitting[best]:
        return best
    raw, values = first[0]
    if format != "auto":
        _refuse_given(first, format, accepts)
    needs = "; ".join(f"{name}: {', '.join(COLUMNS[name])}" for name in candidates)
    renames = [f"{expected}: {given}" for expected, others in OTHER_NAMES.items() for given in values
               if given.lower() in (expected, *others) and expected not in values
               and any(expected in COLUMNS[name] for name in candidates)]
    raise DataError(Fault(
        kind="data", file=raw.file, line=raw.line,
        message=f"columns {', '.join(map(str, values)) or 'none'} fit no format of this task ({needs})",
        mend=(f"perhaps data.columns={{{', '.join(renames[:3])}}}" if renames
              else "rename them with data.columns={expected: given}"),
    ))


def _refuse_given(first: Sequence[tuple[RawRow, Mapping[str, Any]]], format: str, accepts: tuple[str, ...]) -> None:
    """Raise DataError where another format than the given one is there by its columns."""
    try:
        found = _format_of(first, "auto", accepts)
    except DataError:
        return
    raw, needs = first[0][0], ", ".join(COLUMNS[format])
    raise DataError(Fault(kind="data", file=raw.file, line=raw.line, message=f"data.format = {format!r} needs {needs}; "
                          f"the columns are those of {found}", mend=f"data.format=auto, or {found}"))


def prompt_format(values: Mapping[str, Any], format: str) -> str | None:
    """The format that a record to generate from has, in training's order; None where no prompt is there.

    Records need no answers, so a column of plain text decides last: beside a prompt it repeats that and the answer.

    Args:
        values: of the record.
        format: of the training rows, or auto; taken where the record has its prompt.
    """
    there = [name for name in COLUMNS if name in PROMPT_COLUMNS and values.get(PROMPT_COLUMNS[name]) is not None]
    if format in there:
        return format
    whole = [name for name in there if name != "text" and all(column in values for column in COLUMNS[name])]
    return next(iter([*whole, *there]), None)
