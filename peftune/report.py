"""Results become a closing table and one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftune.observe.display import Display


def show_summary(display: Display, folder: str, summary: Mapping[str, Any] | None, *, done_before: bool = False) -> None:
    """Say what came of a run."""
    assert summary is not None
    columns = ["", *[f"{split} {who}" for split in summary["metrics"] for who in ("trained", "untrained")]]
    names = [name for name in next(iter(summary["metrics"].values()), {}) if not name.endswith("_interval")]
    rows = []
    for name in names:
        row = [name]
        for split, metrics in summary["metrics"].items():
            row += [_with_interval(metrics, name), _with_interval(summary["baseline"].get(split, {}), name, short=True)]
        rows.append(row)
    display.table(f"{summary['task']}: {summary['steps']} steps, {summary['seconds']:.0f} s", columns, rows)
    display.say(f"{folder}: final/ holds the trained weights")
    if done_before:
        display.say("this run was done before; nothing was trained. For another run choose another output_dir")


def _with_interval(metrics: Mapping[str, Any], name: str, *, short: bool = False) -> str:
    value, interval = metrics.get(name), metrics.get(f"{name}_interval")
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval and not short else "")


def write_report(folder: Any) -> None:
    """placeholder until the page is written below."""
