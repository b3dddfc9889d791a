"""What a data file holds: rows, each with the place it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peftune.errors import KEPT_FAULTS, Fault


@dataclass(frozen=True, slots=True)
class RawRow:
    """One record as it stands in the file. `line` counts lines of text files, and rows of the others, from 1."""

    values: Mapping[str, Any]
    file: str
    line: int


def record_of(values: Mapping[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    """A row of a table as a file of records would have it. `names`: of columns whose numbers stand for them."""
    return {column: _without_absent(_named(value, names.get(column))) for column, value in values.items()}


def _without_absent(value: Any) -> Any:
    """The same without fields that are null in the records inside it: in a table of columns each record has the fields
    of all others, and a tool's arguments would hold the names of every other tool's."""
    if isinstance(value, Mapping):
        return {key: _without_absent(member) for key, member in value.items() if member is not None}
    return [_without_absent(member) for member in value] if isinstance(value, list) else value


def _named(value: Any, names: list[str] | None) -> Any:
    """A number of a class, or a list of them, as names; what no name belongs to stays as it is."""
    if names is None or value is None:
        return value
    if isinstance(value, list):
        return [_named(member, names) for member in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def file_fault(file: str, line: int | None, message: str, mend: str) -> Fault:
    """What is wrong in a file of data, or in one of its lines."""
    return Fault(kind="data", file=file, line=line, message=message, mend=mend)


@dataclass(frozen=True, slots=True)
class Row:
    """One record in its canonical form.

    `fields` are, by format: classification: text, text_pair, label; text: text;
    prompt_completion: prompt, completion; messages, sharegpt, alpaca: messages, tools; ner: tokens, tags;
    squad: question, context, answers of text and start; preference: prompt or messages, chosen, rejected,
    each a text or turns. Answers that are marked as unwanted: unwanted.
    """

    fields: Mapping[str, Any]
    file: str
    line: int
    id: str
    source: int = 0
    """Position of the row's source in `data.train`."""


@dataclass(slots=True)
class Faults:
    """Bad rows, counted, and the first of them kept."""

    kept: list[Fault] = field(default_factory=list)
    count: int = 0

    def add(self, fault: Fault) -> None:
        """Count a fault, and keep it while there is room."""
        self.count += 1
        if len(self.kept) < KEPT_FAULTS:
            self.kept.append(fault)

    def add_all(self, faults: Iterable[Fault]) -> None:
        """The same for several."""
        for fault in faults:
            self.add(fault)
