"""A plan for a person: a table of causes by instant, and a bar of what fills the device, at 80 columns; and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftune.plan.answer import Answer
from peftune.plan.footprint import CAUSES
from peftune.plan.mends import Mend

GIB = 2**30
WIDTH = 80
BAR = 58
MARKS = "#=%@+-:.o*x"
"""One mark a cause, in the order of `CAUSES`."""
HOURS, MINUTES = 3600, 60


def rendered(found: Answer, ways: list[Mend], note: str) -> str:
    """The text of `peftune plan`."""
    case, plan = found.case, found.found
    counts = plan.parameters
    head = [
        f"{_cut(case.config.model.name_or_path)}: {counts.total:,} weights, {counts.trainable:,} train",
        f"{case.division.ranks} x {case.device.name} ({case.device.memory_bytes / GIB:.1f} GiB each), "
        f"{case.division.strategy}, {case.config.model.dtype}",
        f"{found.choice.micro_batch_tokens:,} tokens a micro-batch"
        + (", activations recomputed" if found.choice.gradient_checkpointing else ""),
        f"lengths: {note}",
    ]
    return "\n".join([*(_folded(line) for line in head), "", *_table(plan.instants), "", _bar(found), "",
                      *_verdict(found, ways)])


def as_json(found: Answer, ways: list[Mend], note: str) -> dict[str, Any]:
    """The object of `--json`: bytes are per device."""
    return {
        "fits": found.fits, "peak_bytes": found.found.peak_bytes, "peak_instant": found.found.peak_instant,
        "by_cause": _rounded(found.found.instants[found.found.peak_instant]),
        "instants": {name: _rounded(causes) for name, causes in found.found.instants.items()},
        "parameters": {"total": found.found.parameters.total, "trainable": found.found.parameters.trainable},
        "device": {"name": found.case.device.name, "memory_bytes": found.case.device.memory_bytes,
                   "count": found.case.division.ranks},
        "strategy": found.case.division.strategy,
        "settings": {"tokens_per_micro_batch": found.choice.micro_batch_tokens,
                     "gradient_checkpointing": found.choice.gradient_checkpointing},
        "lengths": note,
        "time": {"tokens_per_second": found.tokens_per_second, "seconds": found.seconds,
                 "assumed_share_of_rate": found.case.device.reached},
        "mends": [{"change": list(way.words), "same_result": way.same_result, "peak_bytes": way.answer.found.peak_bytes,
                   "tokens_per_second": way.answer.tokens_per_second, "seconds": way.answer.seconds}
                  for way in ways],
    }


def _rounded(causes: Mapping[str, float]) -> dict[str, int]:
    return {cause: round(causes[cause]) for cause in CAUSES if causes.get(cause, 0.0) >= 1}


def _cut(name: str) -> str:
    return name if len(name) < WIDTH // 2 else f"...{name[-WIDTH // 2:]}"


def _folded(line: str) -> str:
    words, lines = line.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) >= WIDTH and lines[-1].strip():
            lines.append("  ")
        lines[-1] += word if not lines[-1].strip() else f" {word}"
    return "\n".join(lines)


def _table(instants: Mapping[str, Mapping[str, float]]) -> list[str]:
    """GiB by cause, a column an instant."""
    widths = {name: max(10, len(name) + 1) for name in instants}

    def row(label: str, cells: Mapping[str, str]) -> str:
        return label.ljust(17) + "".join(cells[name].rjust(width) for name, width in widths.items())

    lines = [row("GiB a device", {name: name for name in instants})]
    for cause in CAUSES:
        sizes = {name: causes.get(cause, 0.0) for name, causes in instants.items()}
        if max(sizes.values()) >= 0.005 * GIB:
            lines.append(row(cause.replace("_", " "), {name: _gib(size) for name, size in sizes.items()}))
    return [*lines, row("together", {name: _gib(sum(causes.values())) for name, causes in instants.items()})]


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _bar(found: Answer) -> str:
    """The peak instant against the device's memory; what does not fit stands right of the bar."""
    causes, memory = found.found.instants[found.found.peak_instant], found.case.device.memory_bytes
    scale = BAR / max(memory, found.found.peak_bytes)
    bar, legend, filled = "", [], 0.0
    for cause, mark in zip(CAUSES, MARKS, strict=True):
        filled += causes.get(cause, 0.0) * scale
        grown = mark * (round(filled) - len(bar))
        bar += grown
        if grown:
            legend.append(f"{mark} {cause.replace('_', ' ')}")
    limit = round(memory * scale)
    bar = bar.ljust(max(limit, len(bar)))
    line = f"{found.found.peak_instant:<10} |{bar[:limit]}|{bar[limit:]}"
    return "\n".join([line, _folded("  ".join(legend))])


def _verdict(found: Answer, ways: list[Mend]) -> list[str]:
    peak, memory = found.found.peak_bytes, found.case.device.memory_bytes
    share = f"{_gib(peak)} of {_gib(memory)} GiB at {found.found.peak_instant}"
    speed = _speed(found)
    if found.fits:
        return [f"fits: {share}", _folded(f"time: {speed}")]
    lines = [f"does not fit: {share}"]
    if not ways:
        return [*lines, _folded("no single change of ours makes it fit, nor all of them together: more or larger "
                                "devices, or a smaller model")]
    lines.append("what makes it fit, the fastest first of those that keep the result:")
    for way in ways:
        lines += [f"  {' '.join(way.words)}" + ("" if way.same_result else "   (another result)"),
                  f"    {_gib(way.answer.found.peak_bytes)} GiB, {_speed(way.answer)}"]
    return lines


def _speed(found: Answer) -> str:
    rate = f"{found.tokens_per_second:,.0f} tokens/s" + (
        f" at {found.case.device.reached:.0%} of the device's rate")
    if found.seconds is None:
        return rate
    hours, rest = divmod(round(found.seconds), HOURS)
    return f"{rate}, {hours} h {rest // MINUTES:02d} min of training"
