"""What a run's numbers mean, in plain words: better than nothing, overfitted, or flattered by its data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from peftune.data.findings import LEAKS
from peftune.report.run_folder import Finished
from peftune.report.words import Metrics, interval_of, lower_is_better, number, value_of

SAME_LOSS = 0.01
"""A validation loss is said to have risen, or to fall still, if it has done so by more than this share."""
PLACE = re.compile(r".*?:\d+(?=: )", re.DOTALL)
"""File and line, before what a finding says of them."""


@dataclass(frozen=True, slots=True)
class Remark:
    """One sentence, and how it is meant."""

    kind: Literal["good", "doubtful", "bad"]
    text: str


def verdict(run: Finished) -> list[Remark]:
    """All there is to say of a run, what matters most first."""
    return [*_gain(run), *_gap(run), *_course(run), *_leaks(run)]


def _gain(run: Finished) -> Iterator[Remark]:
    """Is the trained model better than the untrained one, and than a guess that reads nothing, beyond chance?"""
    metric, split = run.summary["metric"], run.shown_split
    if split is None:
        yield Remark("doubtful", "Nothing was held out, so nothing says whether the model has learned what was meant: "
                     "name data.validation or data.test.")
        return
    metrics = run.summary["metrics"][split]
    if metrics.get(metric) is None:
        yield Remark("doubtful", f"The {metric} of {split} is undefined on these rows.")
        return
    said = f"{split} {metric} {value_of(metrics, metric)} {interval_of(metrics, metric)}".rstrip()
    known = [(who, run.summary[key].get(split, {}).get(metric)) for who, key in
             (("the untrained model", "baseline"), ("the guess that reads nothing", "majority"))]
    for who, before in known:
        if before is not None and (kind := _compared(metric, metrics, before)) != "better":
            yield Remark("bad", f"{said}: {kind} {who} ({number(before)})"
                         + (", as far as these rows can tell." if kind.startswith("no") else "."))
            return
    beaten = " and ".join(f"{who} ({number(before)})" for who, before in known if before is not None)
    yield Remark("good", f"{said}: better than {beaten}." if beaten else f"{said}.")


def _compared(metric: str, metrics: Metrics, before: float) -> str:
    """Better where the interval lies wholly on the better side; by the values alone where there is no interval."""
    sign = -1 if lower_is_better(metric) else 1
    low, high = metrics.get(f"{metric}_interval") or (metrics[metric], metrics[metric])
    if sign * (min if sign > 0 else max)(low, high) > sign * before:
        return "better"
    return "worse than" if sign * (max if sign > 0 else min)(low, high) < sign * before else "no better than"


def _gap(run: Finished) -> Iterator[Remark]:
    """Does it do better on rows it was trained on than on others, by the same metric?"""
    part, metric, split = run.summary.get("train_part") or {}, run.summary["metric"], run.shown_split
    known, new = part.get("metrics", {}), run.summary["metrics"].get(split, {})
    if known.get(metric) is None or new.get(metric) is None:
        return
    said = (f"{metric} is {value_of(known, metric)} {interval_of(known, metric)} on {part['rows']:,} training rows and "
            f"{value_of(new, metric)} {interval_of(new, metric)} on {split}")
    ours, theirs = known.get(f"{metric}_interval"), new.get(f"{metric}_interval")
    worse = known[metric] < new[metric] if lower_is_better(metric) else known[metric] > new[metric]
    if ours and theirs and worse and (ours[0] > theirs[1] or ours[1] < theirs[0]):
        yield Remark("doubtful", f"Overfitted: {said}. It knows by heart what it does not know in general: more rows, "
                     "fewer epochs, a smaller adapter or weight decay would narrow the gap.")
    elif ours and theirs:
        yield Remark("good", f"No overfitting to be seen: {said}; the intervals overlap or the gap is the other way.")
    else:
        yield Remark("good", f"{said[0].upper()}{said[1:]}.")


def _course(run: Finished) -> Iterator[Remark]:
    """Did the validation loss turn up, or was it falling still?"""
    points = run.points("validation", "loss")
    if len(points) < 3:
        return
    (lowest_step, lowest), (last_step, last) = min(points, key=lambda point: point[1]), points[-1]
    if last > lowest * (1 + SAME_LOSS):
        kept = (f"best/ holds step {run.summary['best_step']}" if run.summary["best_step"] is not None
                else "no best weights were kept")
        yield Remark("doubtful", f"The validation loss turned up: lowest at step {lowest_step:,} ({number(lowest)}), "
                     f"{number(last)} at the end, step {last_step:,}; {kept}, chosen by {run.summary['metric']}.")
    elif last < points[-2][1] * (1 - SAME_LOSS) and run.summary["best_step"] == run.summary["steps"]:
        yield Remark("doubtful", f"Validation was improving still at the end (the loss from {number(points[-2][1])} to "
                     f"{number(last)} in the last evaluation): a longer run may well be better.")


def _leaks(run: Finished) -> Iterator[Remark]:
    """How much of a score comes from rows that the training rows hold too, or nearly?"""
    metric = run.summary["metric"]
    for split in run.summary["metrics"]:
        places = [place for finding in run.manifest["data"]["findings"]
                  if finding["kind"] in LEAKS and finding["split"] == split for place in finding["places"]]
        if not places:
            continue
        records = run.records(split)
        named = {found[0] for place in places if (found := PLACE.match(place))}
        known = [record for record in records if record.get("source") in named]
        others = [record for record in records if record.get("source") not in named]
        said = f"{len(named):,} rows of {split} stand in the training rows too, or nearly"
        if not known or not others:
            yield Remark("doubtful", f"{said}.")
            continue
        there, elsewhere = (run.task.metrics(part, run.targets, False).get(metric) for part in (known, others))
        yield Remark("doubtful", f"{said}: on {len(known):,} of them {metric} is {number(there)}, on the other "
                     f"{len(others):,} rows {number(elsewhere)}. The second number is the honest one.")
