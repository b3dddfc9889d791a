"""What is wrong, or looks wrong, in data, with the rows where it stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from peftune.errors import Fault

SHOWN_PLACES = 1000
"""A finding names so many rows at most."""


LEAKS = ("leak", "near_leak")
"""Kinds of findings that raise the scores."""


@dataclass(frozen=True, slots=True)
class Place:
    """One row of a finding."""

    file: str
    line: int
    message: str


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why the tokens of a row may not say what the row says."""

    kind: Literal["round_trip", "joined_tokens"]
    message: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to look at in a split."""

    kind: str
    """leak | near_leak | conflicting_label | exact_duplicate | near_duplicate | tag_scheme | unwanted_answer |
    lost_characters | imbalance | few_examples | label_spelling | round_trip | joined_tokens | too_long | no_target."""
    split: str
    message: str
    mend: str
    count: int
    """How many rows are concerned, shown or not."""
    places: tuple[Place, ...]
    """The first of them, in order; of imbalance and few_examples the first row of each class, of too_long the
    longest."""


def as_faults(findings: Iterable[Finding], severity: Literal["error", "warning"]) -> Iterator[Fault]:
    """One fault a place, so that each can be looked up."""
    for finding in findings:
        for place in finding.places:
            yield Fault(kind=finding.kind, severity=severity, file=place.file, line=place.line, message=place.message,
                        mend=finding.mend)
