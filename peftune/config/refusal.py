"""What is refused because it cannot work: the shape that all rules share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Asked = TypeVar("Asked")


@dataclass(frozen=True, slots=True)
class Refusal(Generic[Asked]):
    """A combination that cannot work, and the nearest that does."""

    key: str
    """Where the user would mend it first, with dots."""
    broken_by: Callable[[Asked], bool]
    why: str
    mend: str
