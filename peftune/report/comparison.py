"""Several runs side by side: settings that differ, scores, curves, cost, and which differences are more than chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peftune.numerics.intervals import adjusted_for_many, interval, two_sided_p
from peftune.observe.chart import Curve
from peftune.report.outcomes import Table
from peftune.report.run_folder import Finished
from peftune.report.sections import SIDE_CURVES, Figure, figure, memory_points
from peftune.report.words import Metrics, gib, interval_of, lower_is_better, metric_names, number, value_of
from peftune.tasks.task import RESAMPLED, Record

SIGNIFICANT = 0.05
"""Chance of a false alarm in all the comparisons of a page."""
NOT_COMPARED = ("output_dir", "resume")


@dataclass(frozen=True, slots=True)
class Difference:
    """One run against the first, by one metric on the rows that both were scored on."""

    run: str
    split: str
    metric: str
    rows: int
    value: float
    """Of the run, on these rows."""
    first: float
    difference: float
    low: float
    high: float
    p: float
    """Adjusted for the number of comparisons (Holm)."""
    verdict: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the page shows."""

    summaries: Mapping[str, Metrics]
    """Of each run, by a name that tells it from the others."""
    settings: Table
    scores: Table
    differences: Sequence[Difference]
    notes: Sequence[str]
    """Why runs cannot be compared, or not on all rows."""
    figures: Sequence[Figure]
    cost: Table

    def as_json(self) -> dict[str, Any]:
        """What `peftune report --json` prints of it."""
        return {"runs": dict(self.summaries), "settings": {key: values for key, *values in self.settings.rows},
                "differences": [asdict(difference) for difference in self.differences], "notes": list(self.notes)}


def compare(runs: Sequence[Finished]) -> Comparison:
    """Lay runs beside each other. Differences are tested against the first."""
    names = _names(runs)
    differences, notes = _differences(runs, names)
    summaries = {name: run.summary for name, run in zip(names, runs, strict=True)}
    return Comparison(summaries, _settings(runs, names), _scores(runs, names), differences, notes,
                      _figures(runs, names), _cost(runs, names))


def _names(runs: Sequence[Finished]) -> list[str]:
    """Folder names; whole paths where two are alike."""
    short = [run.name for run in runs]
    return [str(run.folder) if short.count(name) > 1 else name for run, name in zip(runs, short, strict=True)]


def _settings(runs: Sequence[Finished], names: Sequence[str]) -> Table:
    flat = [{key: _written(value) for key, value in _flat(run.settings)} for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings if key not in NOT_COMPARED)
    rows = [[key, *(settings.get(key, "-") for settings in flat)] for key in keys
            if len({settings.get(key, "-") for settings in flat}) > 1]
    return Table("", ("setting", *names), rows)


def _written(value: Any) -> str:
    """As a config has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _scores(runs: Sequence[Finished], names: Sequence[str]) -> Table:
    keys = dict.fromkeys((split, name) for run in runs for split, metrics in run.summary["metrics"].items()
                         for name in metric_names(metrics))
    rows = []
    for split, name in keys:
        cells = [run.summary["metrics"].get(split, {}) for run in runs]
        rows.append([f"{split} {name}", *(f"{value_of(cell, name)} {interval_of(cell, name)}".strip()
                                          for cell in cells)])
    return Table("", ("", *names), rows)


def _differences(runs: Sequence[Finished], names: Sequence[str]) -> tuple[list[Difference], list[str]]:
    first = runs[0]
    metric = first.summary["metric"]
    found: list[Difference] = []
    notes: list[str] = []
    for run, name in zip(runs[1:], names[1:], strict=True):
        if run.summary["task"] != first.summary["task"] or run.targets != first.targets:
            notes.append(f"{name} learns another task, or other classes, than {names[0]}: scores cannot be compared.")
            continue
        for split in first.summary["metrics"]:
            pairs, left_out = joined(first.records(split), run.records(split))
            if left_out:
                notes.append(f"{name}, {split}: {left_out:,} rows are not in both runs and were left out.")
            if pairs and (difference := _difference(first, name, split, metric, pairs)):
                found.append(difference)
            else:
                notes.append(f"{name}, {split}: no rows to compare {metric} on.")
    raised = adjusted_for_many([difference.p for difference in found])
    return [Difference(**{**asdict(difference), "p": p, "verdict": _verdict(difference, p, names[0])})
            for difference, p in zip(found, raised, strict=True)], notes


def joined(ours: Sequence[Record], theirs: Sequence[Record]) -> tuple[list[tuple[Record, Record]], int]:
    """Records of the same row in both runs, and how many rows have no counterpart.

    The same row: of equal id and reference; where several rows of a split have one id, the first of them and the first,
    the second and the second.
    """
    known = dict(_numbered(theirs))
    pairs = [(record, known[key]) for key, record in _numbered(ours)
             if key in known and known[key]["reference"] == record["reference"]]
    return pairs, len(ours) + len(known) - 2 * len(pairs)


def _numbered(records: Sequence[Record]) -> Iterator[tuple[tuple[Any, int], Record]]:
    """Each record with its id and how many before it have the same."""
    before: Counter[Any] = Counter()
    for record in records:
        yield (record["id"], before[record["id"]]), record
        before[record["id"]] += 1


def _difference(
    first: Finished, name: str, split: str, metric: str, pairs: Sequence[tuple[Record, Record]]
) -> Difference | None:
    """Run minus first, over the same resamples of the same rows; None where the metric is undefined on them."""
    before, after = (first.task.metrics([pair[side] for pair in pairs], first.targets, True) for side in (0, 1))
    if before.get(metric) is None or after.get(metric) is None:
        return None
    changes = after[f"{metric}{RESAMPLED}"] - before[f"{metric}{RESAMPLED}"]
    low, high = interval(changes)
    return Difference(run=name, split=split, metric=metric, rows=len(pairs), value=after[metric], first=before[metric],
                      difference=after[metric] - before[metric], low=low, high=high, p=two_sided_p(changes), verdict="")


def _verdict(difference: Difference, p: float, first: str) -> str:
    if p >= SIGNIFICANT:
        return f"no difference that these rows can show (p = {p:.2g})"
    better = (difference.difference < 0) == lower_is_better(difference.metric)
    return f"{'better' if better else 'worse'} than {first} (p = {p:.2g})"


def _figures(runs: Sequence[Finished], names: Sequence[str]) -> list[Figure]:
    metric = runs[0].summary["metric"]
    kinds = [("train loss", "train", "loss"), ("validation loss", "validation", "loss")]
    if metric != "loss":
        kinds.append((f"validation {metric}", "validation", metric))
    kinds += [(title, "train", key) for title, key in SIDE_CURVES]
    charts = [figure(title, [Curve(name, run.points(split, key)) for name, run in zip(names, runs, strict=True)])
              for title, split, key in kinds]
    charts.append(figure("peak memory, GiB", [Curve(name, memory_points(run))
                                              for name, run in zip(names, runs, strict=True)]))
    return [chart for chart in charts if chart is not None]


def _cost(runs: Sequence[Finished], names: Sequence[str]) -> Table:
    said = [run.summary for run in runs]
    rows = [
        ("tokens/s", *(f"{summary['tokens_per_second']:,.0f}" for summary in said)),
        ("training, s", *(f"{summary['seconds']:,.1f}" for summary in said)),
        ("steps", *(f"{summary['steps']:,}" for summary in said)),
        ("tokens", *(f"{summary['tokens']:,}" for summary in said)),
        ("peak memory", *(gib(summary["peak_memory_bytes"]) for summary in said)),
        ("trained weights", *(f"{summary['trainable_parameters']:,}" for summary in said)),
        ("strategy", *(f"{summary['strategy']} on {summary['world_size']} x {run.manifest['device']}"
                       for summary, run in zip(said, runs, strict=True))),
        ("largest difference of logits after reloading", *(number(summary["reload_deviation"]) for summary in said)),
    ]
    return Table("", ("", *names), rows)
