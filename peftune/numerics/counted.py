"""Numbers with what they count."""

from __future__ import annotations

from collections.abc import Mapping

PLURALS: Mapping[str, str] = {"class": "classes", "entity": "entities", "process": "processes"}
"""Those that do more than add an s."""


def counted(count: int, unit: str) -> str:
    """1 row, 2 rows, 3 classes, 4 entities; of several words the last one changes."""
    before, blank, last = unit.rpartition(" ")
    plural = PLURALS.get(last, f"{last}s")
    return f"{count:,} {before}{blank}{last if count == 1 else plural}"
