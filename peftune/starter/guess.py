"""What a data file is for, judged by the names of its columns and by what stands in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from peftune.config.rules import FORMATS
from peftune.data.canonical import CANONICAL, class_names
from peftune.data.formats import COLUMNS, OTHER_NAMES
from peftune.data.targets import RowFault
from peftune.errors import DataError, Fault

TASK_OF = {format: task for task, formats in FORMATS.items() for format in formats}
FITTING_SHARE = 0.9
"""Of the rows looked at, so many must hold what a format asks for."""
MOST_CLASSES, ROWS_A_CLASS, LONGEST_CLASS = 20, 5, 60
"""A column of classes has few values, or at least so many rows for each, none longer than that."""
PAIRS = (("premise", "hypothesis"), ("question", "sentence"), ("query", "document"), ("query", "passage"))
"""Names of the two texts of a pair; others end in 1 and 2, or a and b."""
Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Guess:
    """What is to be learned from which columns."""

    task: str
    format: str
    columns: dict[str, str] = field(default_factory=dict)
    """Renames, as {expected name: name in the file}."""
    classes: tuple[str, ...] = ()
    problem: str = "auto"
    unread: tuple[str, ...] = ()
    """Columns of text beside the one that is classified."""


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
    ways = (_named(rows, formats, columns, loose=False), _named(rows, formats, columns, loose=True),
            _by_content(file, rows, formats, columns))
    found = [(format, renames) for way in ways for format, renames in way if _holds(rows, format, renames)]
    if not found:
        wanted = "; ".join(f"{TASK_OF[name]}: {', '.join(COLUMNS[name])}" for name in formats)
        raise DataError(Fault(kind="data", file=file, message=f"columns {', '.join(names)} suit no task ({wanted})",
                              mend="say which is which: --columns text=THE_COLUMN label=ANOTHER"))
    format, renames = next((pair for pair in found if pair[0] != "text"), found[0])  # any row has a text
    texts = _texts_beside(rows, {**renames, **columns}) if format == "classification" else []
    if format == "classification" and (pair := _pair(renames.get("text", "text"), texts, columns)):
        renames = {**renames, **pair}
        texts = [name for name in texts if name not in renames.values()]
    return Guess(TASK_OF[format], format, {**renames, **columns}, *_labels(rows, format, renames), tuple(texts))


def _named(
    rows: Sequence[Values], formats: Sequence[str], given: Mapping[str, str], *, loose: bool
) -> Iterator[tuple[str, dict[str, str]]]:
    """Formats whose columns are there by name; loosely also under another usual name, and in capitals."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    for format in formats:
        renames: dict[str, str] = {}
        for expected in (*COLUMNS[format], *(("answers",) if format == "squad" else ())):
            usual = (expected, *(OTHER_NAMES.get(expected, ()) if loose else ()))
            same = [name for one in usual for name in names
                    if name == one or (loose and name.lower() == one and name not in renames.values())]
            if expected in given:
                renames[expected] = given[expected]
            elif same:
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
    text = given.get("text") or max(texts, key=lambda name: texts[name], default=None)
    others = {name: values for name, values in columns.items() if name != text}
    labels = [given["label"]] if "label" in given else (
        [name for name, values in others.items() if _are_classes(values) and not _are_dates(values)]
        or [name for name, values in others.items() if _are_fractions(values)])
    if text is None or not labels:
        return
    if len(labels) > 1:
        raise DataError(Fault(kind="data", file=file, message=f"several columns could be the classes: "
                              f"{', '.join(labels)}", mend=f"say which: --columns text={text} label={labels[0]}"))
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


def _holds(rows: Sequence[Values], format: str, renames: Mapping[str, str]) -> bool:
    """Whether the rows hold what the format asks for, not only its names."""
    good = 0
    for row in rows:
        try:
            CANONICAL[format]({**row, **{expected: row[name] for expected, name in renames.items() if name in row}})
        except RowFault:
            continue
        good += 1
    return good > 0 and good >= FITTING_SHARE * len(rows)


def _labels(rows: Sequence[Values], format: str, renames: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    """The classes of text, and the kind of label where files cannot say it: a CSV file holds numbers as text."""
    if format != "classification":
        return (), "auto"
    labels = [row[renames.get("label", "label")] for row in rows if row.get(renames.get("label", "label")) is not None]
    if _are_fractions(labels):
        return (), "regression"
    return tuple(sorted({name for label in labels for name in class_names(label)})), "auto"


def _are_fractions(values: Sequence[Any]) -> bool:
    try:
        return any(not float(value).is_integer() for value in values)
    except (TypeError, ValueError):
        return False
