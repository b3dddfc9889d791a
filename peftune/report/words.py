"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftune.tasks.task import LOWER_IS_BETTER

Metrics = Mapping[str, Any]

SHOWN_CHARACTERS = 600
"""Of a longer text a page shows the beginning and the end."""


def metric_names(metrics: Metrics) -> list[str]:
    """The metrics themselves, without their intervals."""
    return [name for name in metrics if not name.endswith("_interval")]


def number(value: float | None) -> str:
    """Four digits after the point, none of a count; a dash for what is undefined."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def value_of(metrics: Metrics, name: str) -> str:
    """A metric's value."""
    return number(metrics.get(name))


def interval_of(metrics: Metrics, name: str) -> str:
    """A metric's 95 % interval, empty where there is none."""
    interval = metrics.get(f"{name}_interval")
    return f"[{number(interval[0])}, {number(interval[1])}]" if interval else ""


def lower_is_better(name: str) -> bool:
    """Whether a smaller value of the metric is the better one."""
    return name in LOWER_IS_BETTER


def gib(size_bytes: float) -> str:
    """Bytes in GiB."""
    return f"{size_bytes / 2**30:.2f} GiB"


def shortened(text: str, most: int = SHOWN_CHARACTERS) -> str:
    """A text of at most about `most` characters: what lies between its beginning and its end is left out."""
    if len(text) <= most:
        return text
    left_out = len(text) - most
    return f"{text[: most // 2]} [… {left_out:,} characters …] {text[-(most - most // 2):]}"
