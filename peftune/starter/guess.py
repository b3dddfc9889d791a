"""What a data file is for, judged by the names of its columns and by what stands in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from peftune.config.rules import FORMATS
from peftune.data.canonical import CANONICAL, class_names
from peftune.data.formats import COLUMNS, OTHER_NAMES
from peftune.data.targets import RowFault
from peftune.errors import DataError, Fault
from peftune.starter.beside import AS_LISTS, Values, are_flags, as_instructions, notes_beside

TASK_OF = {format: task for task, formats in FORMATS.items() for format in formats}
NEAR_MOST = 0.9
"""The first format that fits so many times the rows that any fits is taken."""
ALSO_READ: Mapping[str, tuple[str, ...]] = {
    "alpaca": ("input", "system", "history"), "messages": ("system", "tools"), "sharegpt": ("system", "tools"),
    "classification": ("text_pair",), "squad": ("answers", "is_impossible"),
    "prompt_completion": ("system",), "preference": ("prompt", "messages", "conversations", "system", "tools")}
"""Columns that a format takes where they are there."""
SOUGHT: Mapping[str, tuple[str, ...]] = {
    "squad": ("answers",), "preference": ("prompt", "system"), "alpaca": ("input", "system"),
    "prompt_completion": ("system",), "messages": ("system",), "sharegpt": ("system",)}
"""Those of them that are looked for under other usual names too."""
MOST_CLASSES, ROWS_A_CLASS, LONGEST_CLASS = 20, 5, 60
"""A column of classes has few values, or at least so many rows for each, none longer than that."""
MOST_REASONS = 3
PAIRS = (("premise", "hypothesis"), ("question", "sentence"), ("query", "document"), ("query", "passage"))
"""Names of the two texts of a pair; others end in 1 and 2, or a and b."""


@dataclass(frozen=True, slots=True)
class Guess:
    """What is to be learned from which columns."""

    task: str
    format: str
    columns: dict[str, str] = field(default_factory=dict)
    """Renames, as {expected name: name in the file}."""
    classes: tuple[str, ...] = ()
    problem: str = "auto"
    notes: tuple[str, ...] = ()
    """What is left out: columns that are not read, rows that do not fit."""


def guess(file: str, rows: Sequence[Values], task: str | None, columns: Mapping[str, str]) -> Guess:
    """The task, format and columns that rows suggest.

    Args:
        file: for messages.
        rows: the first ones, raw.
        task: given by the user, or None.
        columns: renames given by the user.

    Raises:
        DataError: nothing fits, several columns could be the classes, or a column that was given is not there.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    for expected, given in columns.items():
        if given not in names:
            raise DataError(Fault(kind="data", file=file, message=f"no column {given} for {expected}",
                                  mend=f"the columns are {', '.join(names)}"))
    formats = [name for name in COLUMNS if task is None or name in FORMATS[task]]
    format, renames, good = _fitting(file, rows, formats, columns)
    if format == "prompt_completion" and (read := as_instructions(names, renames, columns)):
        format, renames = "alpaca", read
    texts = _texts_beside(rows, {**renames, **columns}) if format == "classification" else []
    if format == "classification" and (pair := _pair(renames.get("text", "text"), texts, columns)):
        renames = {**renames, **pair}
    renames = {**renames, **columns}
    labels, problem = _labels(good, format, renames)
    notes = (*_unread(rows, format, renames, texts),
             *notes_beside(file, rows, format, renames, _beside(rows, format, renames), task),
             *_left_out(rows, format, renames))
    return Guess(TASK_OF[format], format, renames, labels, problem, notes)


def _fitting(
    file: str, rows: Sequence[Values], formats: Sequence[str], given: Mapping[str, str]
) -> tuple[str, dict[str, str], list[Values]]:
    """The format of the rows, its renames, and the rows that have it: by name before by content, as text at last."""
    named: list[tuple[str, dict[str, str]]] = []
    texts: list[tuple[str, dict[str, str], list[Values]]] = []
    for way in (_named(rows, formats, given, loose=False), _named(rows, formats, given, loose=True),
                _by_content(file, rows, formats, given)):
        pairs = list(way)
        named += pairs
        found = [(format, renames, _good(rows, format, renames)) for format, renames in pairs]
        texts += [one for one in found if one[0] == "text" and one[2]]  # any row has a text
        others = [one for one in found if one[0] != "text"]
        most = max((len(good) for _, _, good in others), default=0)
        if most:
            return next(one for one in others if len(one[2]) >= NEAR_MOST * most)
    if texts:
        return texts[0]
    if named:
        format, renames = named[0]
        said = _reasons(rows, format, renames)
        raise DataError(Fault(kind="data", file=file, message=f"looks like {TASK_OF[format]} ({format}), but {said}",
                              mend=f"mend the rows, or {_which(formats)}"))
    names = dict.fromkeys(name for row in rows for name in row)
    wanted = "; ".join(f"{TASK_OF[name]}: {', '.join(COLUMNS[name])}" for name in formats)
    alone = len({TASK_OF[name] for name in formats}) == 1
    raise DataError(Fault(
        kind="data", file=file,
        message=f"columns {', '.join(names)} {'do not suit the task' if alone else 'suit no task'} ({wanted})",
        mend=("choose another --task, or " if alone else "") + _which(formats)))


def _which(formats: Sequence[str]) -> str:
    """How to say it oneself, for the usual ones of several formats."""
    usual = [name for name in ("classification", "prompt_completion") if name in formats] or formats[:1]
    words = " or ".join(" ".join(f"{name}=COLUMN_{number}" for number, name in enumerate(COLUMNS[format], start=1))
                        for format in usual)
    return f"say which is which: --columns {words}"


def _named(
    rows: Sequence[Values], formats: Sequence[str], given: Mapping[str, str], *, loose: bool
) -> Iterator[tuple[str, dict[str, str]]]:
    """Formats whose columns are there by name; loosely also under another usual name, and in capitals."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    for format in formats:
        renames: dict[str, str] = {}
        for expected in (*COLUMNS[format], *SOUGHT.get(format, ())):
            usual = (expected, *(OTHER_NAMES.get(expected, ()) if loose else ()))
            same = [name for one in usual for name in names
                    if name == one or (loose and name.lower() == one and name not in renames.values())]
            if expected in given:
                renames[expected] = given[expected]
            elif same and (expected in COLUMNS[format] or same[0] not in renames.values()):
                renames[expected] = same[0]
        if renames.keys() >= set(COLUMNS[format]) and len(set(renames.values())) == len(renames):
            yield format, {expected: name for expected, name in renames.items() if expected != name}


def _by_content(
    file: str, rows: Sequence[Values], formats: Sequence[str], given: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """A column of long texts beside one of few short values, or of fractions: texts and their classes or scores."""
    if "classification" not in formats:
        return
    columns = {name: [row[name] for row in rows if row.get(name) not in (None, "")]
               for name in dict.fromkeys(name for row in rows for name in row)}
    texts = {name: sum(map(len, values)) for name, values in columns.items()
             if values and all(isinstance(value, str) for value in values)}
    by_name = {name.lower(): name for name, values in columns.items() if values}
    text = given.get("text") or by_name.get("text") or max(texts, key=lambda name: texts[name], default=None)
    others = {name: values for name, values in columns.items() if name != text}
    label = given.get("label") or by_name.get("label")
    labels = [label] if label else (
        [name for name, values in others.items() if _are_classes(values) and not _are_dates(values)]
        or [name for name, values in others.items() if _are_fractions(values)])
    if text is None or not labels:
        return
    if len(labels) > 1:
        several = f"; {AS_LISTS}" if sum(are_flags(columns[name]) for name in labels) > 1 else ""
        raise DataError(Fault(
            kind="data", file=file, message=f"several columns could be the classes: {', '.join(labels)}",
            mend=f"say which: --columns text={text} label={labels[0]}{several}"))
    yield "classification", {"text": text, "label": labels[0]}


def _texts_beside(rows: Sequence[Values], renames: Mapping[str, str]) -> list[str]:
    """Columns that hold several words in most rows, besides those that are read."""
    read = {*renames.values(), *({"text", "label"} - renames.keys()), "text_pair"}
    words = {name: [" " in str(row[name]).strip() for row in rows if isinstance(row.get(name), str)]
             for name in dict.fromkeys(name for row in rows for name in row) if name not in read}
    return [name for name, several in words.items() if 2 * sum(several) > len(rows)]


def _pair(text: str, others: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Both texts of a pair, told by their names; nothing where there is none."""
    for other in () if "text_pair" in given else others:
        if _name_a_pair(text, other):
            return {"text": text, "text_pair": other} if text != "text" else {"text_pair": other}
        if _name_a_pair(other, text) and "text" not in given:
            return {"text": other, "text_pair": text}
    return {}


def _name_a_pair(first: str, second: str) -> bool:
    first, second = first.lower(), second.lower()
    return (first, second) in PAIRS or (
        len(first) > 1 and first[:-1] == second[:-1] and (first[-1], second[-1]) in (("1", "2"), ("a", "b")))


def _are_classes(values: Sequence[Any]) -> bool:
    if not all(isinstance(value, str | int) and len(str(value)) <= LONGEST_CLASS for value in values):
        return False
    distinct = len(set(values))
    return 2 <= distinct < len(values) and (distinct <= MOST_CLASSES or distinct * ROWS_A_CLASS <= len(values))


def _are_dates(values: Sequence[Any]) -> bool:
    """As ISO 8601 writes them, with or without a time of day; a number alone is none."""
    try:
        return all("-" in str(value) and datetime.fromisoformat(str(value)) for value in values)
    except ValueError:
        return False


def _renamed(row: Values, renames: Mapping[str, str]) -> dict[str, Any]:
    return {**row, **{expected: row[name] for expected, name in renames.items() if name in row}}


def _empty(row: Values, format: str, renames: Mapping[str, str]) -> str | None:
    """The first column that the format needs and the row has nothing in."""
    names = (renames.get(expected, expected) for expected in COLUMNS[format])
    return next((name for name in names if row.get(name) in (None, "", []) or not str(row[name]).strip()), None)


def _good(rows: Sequence[Values], format: str, renames: Mapping[str, str]) -> list[Values]:
    """Rows that hold what the format asks for, not only its names; none where most of the filled ones do not."""
    good, filled = [], 0
    for row in rows:
        try:
            CANONICAL[format](_renamed(row, renames))
        except RowFault:
            filled += _empty(row, format, renames) is None
        else:
            good.append(row)
    return good if len(good) > filled else []


def _reasons(rows: Sequence[Values], format: str, renames: Mapping[str, str]) -> str:
    """Why rows do not fit, each reason with its count; nothing where all fit."""
    counts: Counter[str] = Counter()
    for row in rows:
        try:
            CANONICAL[format](_renamed(row, renames))
        except RowFault as bad:
            empty = _empty(row, format, renames)
            counts[f"{empty} is empty" if empty is not None else bad.message] += 1
    said = [f"{reason} in {count:,}" for reason, count in counts.most_common(MOST_REASONS)]
    if more := sum(sorted(counts.values())[:-MOST_REASONS]):
        said.append(f"other faults in {more:,}")
    return f"{'; '.join(said)} of the {len(rows):,} rows looked at" if counts else ""


def _left_out(rows: Sequence[Values], format: str, renames: Mapping[str, str]) -> Iterator[str]:
    if said := _reasons(rows, format, renames):
        yield f"{said}: an error, unless data.on_bad_row=skip leaves them out"


def _unread(
    rows: Sequence[Values], format: str, renames: Mapping[str, str], texts: Sequence[str]
) -> Iterator[str]:
    """The columns that no setting reads, and what would read a second text."""
    unread = _beside(rows, format, renames)
    pair = renames.get("text_pair", "text_pair")
    second = None if any(pair in row for row in rows) else next((name for name in texts if name in unread), None)
    if unread:
        mend = f" (--columns text_pair={second} reads a second text)" if second else ""
        said = [name if any(row.get(name) not in (None, "") for row in rows) else f"{name} (empty)" for name in unread]
        yield f"not read: {', '.join(said)}{mend}"


def _beside(rows: Sequence[Values], format: str, renames: Mapping[str, str]) -> list[str]:
    read = {renames.get(name, name) for name in ("id", *COLUMNS[format], *ALSO_READ.get(format, ()))}
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name not in read]


def _labels(rows: Sequence[Values], format: str, renames: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    """The classes of text, and the kind of label where files cannot say it: a CSV file holds numbers as text."""
    if format != "classification":
        return (), "auto"
    labels = [row[renames.get("label", "label")] for row in rows]
    if _are_fractions(labels):
        return (), "regression"
    return tuple(sorted({name for label in labels for name in class_names(label)})), "auto"


def _are_fractions(values: Sequence[Any]) -> bool:
    try:
        return any(not float(value).is_integer() for value in values)
    except (TypeError, ValueError):
        return False
