"""Classes of the training rows, or types of their entities: too rare, too few, or one class written in two ways."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from peftune.data.findings import SHOWN_PLACES, Finding, Place
from peftune.data.rows import Row
from peftune.numerics.counted import counted

RAREST, FEWEST_EXAMPLES = 50, 4
"""The commonest class may have so many times the rows of another; a class needs so many rows."""
SHOWN_CLASSES, SHOWN_ROWS = 5, 20
_BLANKS = re.compile(r"[\s_-]+")


@dataclass(slots=True)
class _Class:
    """A class or a type of entity, and where it is first seen."""

    is_number: bool
    examples: int = 0
    rows: int = 0
    first: list[tuple[str, int]] = field(default_factory=list)
    """File and line of its first rows."""


class ClassCounts:
    """Counts of each class, and what they show.

    - imbalance: classes with fewer than 1/50 of the rows of the commonest one. Not of types of entities.
    - few_examples: classes with fewer than 4 rows, types with fewer than 4 entities.
    - label_spelling: names that differ in case, blanks, hyphens and underscores alone, the commonest left out; numbers
      where more classes have names.
    """

    def __init__(self, unit: str) -> None:
        """`unit` is what a class is counted in: row, or entity."""
        self._unit = unit
        self._known: dict[str, _Class] = {}

    def add(self, row: Row, names: Iterable[str], label: object = "") -> None:
        """Count a training row's classes. `label`: as the row has it, where a row has one."""
        for name, count in Counter(names).items():
            known = self._known.setdefault(name, _Class(isinstance(label, int | float)))
            known.examples += count
            known.rows += 1
            if len(known.first) < SHOWN_ROWS:
                known.first.append((row.file, row.line))

    def findings(self, split: str) -> Iterator[Finding]:
        """What is to be said of the classes of a task that has some."""
        if not self._known:
            return
        yield from self._spelling(split)
        most = max(known.examples for known in self._known.values())
        rare = {name: known for name, known in self._known.items() if known.examples * RAREST < most}
        few = {name: known for name, known in self._known.items() if known.examples < FEWEST_EXAMPLES}
        if rare and self._unit == "row":
            yield self._finding("imbalance", split, rare, f"under 1/{RAREST} of the commonest's {most:,} rows",
                                "gather rows of the rare classes, or judge by macro_f1, which weighs classes alike")
        if few:
            yield self._finding("few_examples", split, few, f"fewer than {counted(FEWEST_EXAMPLES, self._unit)}",
                                "add examples, or merge them into other classes")

    def _spelling(self, split: str) -> Iterator[Finding]:
        groups: defaultdict[str, list[str]] = defaultdict(list)
        for name in self._known:
            groups[_spelled(name)].append(name)
        odd: dict[str, str] = {}
        for names in groups.values():
            usual, *others = sorted(names, key=lambda name: -self._known[name].examples)
            odd |= {name: f"spelled like {usual!r:.60}, which has {self._count(usual)}" for name in others}
        numbers = [name for name, known in self._known.items() if known.is_number]
        if 2 * len(numbers) < len(self._known):
            odd |= dict.fromkeys(numbers, "a number, and other classes have names")
        if odd:
            places = tuple(Place(file, line, f"the class {name!r:.60} is {why}")
                           for name, why in odd.items() for file, line in self._known[name].first)
            told = [f"{name!r:.60} is {why}" for name, why in odd.items()]
            yield Finding("label_spelling", split, f"{counted(len(odd), 'class')} of {split} may be another one: "
                          f"{'; '.join(_some(told))}", "write each class in one way",
                          sum(self._known[name].rows for name in odd), places[:SHOWN_PLACES])

    def _finding(self, kind: str, split: str, classes: Mapping[str, _Class], why: str, mend: str) -> Finding:
        named = [f"{name!r:.60} has {known.examples:,}" for name, known in classes.items()]
        places = tuple(Place(*known.first[0], f"{name!r:.60} has {self._count(name)}; this is the first")
                       for name, known in list(classes.items())[:SHOWN_PLACES])
        return Finding(kind, split, f"{counted(len(named), 'class')} of {split} with {why}: {', '.join(_some(named))}",
                       mend, sum(known.rows for known in classes.values()), places)

    def _count(self, name: str) -> str:
        return counted(self._known[name].examples, self._unit)


def _spelled(name: str) -> str:
    """What remains of a name without the ways of writing it."""
    return _BLANKS.sub(" ", unicodedata.normalize("NFKC", name).casefold()).strip()


def _some(told: list[str]) -> list[str]:
    more = [f"and {len(told) - SHOWN_CLASSES:,} more"] if len(told) > SHOWN_CLASSES else []
    return told[:SHOWN_CLASSES] + more
