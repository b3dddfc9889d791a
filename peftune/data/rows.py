"""What a data file holds: rows, each with the place it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RawRow:
    """One record as it stands in the file. `line` counts lines of text files, and rows of the others, from 1."""

    values: Mapping[str, Any]
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Row:
    """One record in its canonical form.

    `fields` are, by format: classification: text, text_pair, label; text: text;
    prompt_completion: prompt, completion; messages, sharegpt, alpaca: messages, tools.
    """

    fields: Mapping[str, Any]
    file: str
    line: int
    id: str
    source: int = 0
    """Position of the row's source in `data.train`."""
