"""The parts of a run's page that repeat what its folder says: scores, curves, data, what ran."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from peftune.loop.self_check import STEPS
from peftune.numerics.counted import counted
from peftune.observe.chart import Curve, line_chart
from peftune.parallel.names import preset_of, processes_words
from peftune.report.outcomes import Table
from peftune.report.run_folder import Finished
from peftune.report.words import Metrics, gib, interval_of, metric_names, shortened, value_of

SHOWN_PLACES = 5
"""Rows of a finding that the page names."""
SHOWN_FINDINGS = 40
DATA_COUNTS = ("rows", "kept", "bad", "truncated", "dropped_too_long", "dropped_no_target", "tokens",
               "supervised_targets", "longest")
SIDE_CURVES = (("learning rate", "learning_rate"), ("gradient norm", "grad_norm"), ("tokens/s", "tokens_per_second"))


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its title; the curves are named where there are several."""

    title: str
    chart: Markup
    names: Sequence[str]


def figure(title: str, curves: Sequence[Curve]) -> Figure | None:
    """A chart of the curves that have points; None where none has."""
    if not any(curve.points for curve in curves):
        return None
    names = [curve.name for curve in curves] if len(curves) > 1 else []
    return Figure(title, Markup(line_chart(curves)), names)


def score_table(run: Finished) -> Table:
    """Every metric of the last weights, of the best ones where they are others, untrained, and guessed.

    Those of single classes have a table of their own.
    """
    summary = run.summary
    columns = [("final", summary["metrics"])]
    if summary["best_step"] not in (None, summary["steps"]):
        columns.append((f"best (step {summary['best_step']:,})", summary["best"]))
    columns.append(("untrained", summary["baseline"]))
    if any(summary["majority"].values()):
        columns.append(("majority", summary["majority"]))
    if part := summary.get("train_part"):
        columns.append((f"{part['rows']:,} training rows", dict.fromkeys(summary["metrics"], part["metrics"])))
    rows = []
    for split, metrics in summary["metrics"].items():
        for name in metric_names(metrics):
            if "/" not in name:
                rows.append([f"{split} {name}", *(_cell(head, known.get(split, {}), name) for head, known in columns)])
    return Table("", ("", *(head for head, _ in columns)), rows)


def _cell(head: str, metrics: Metrics, name: str) -> str:
    value = value_of(metrics, name)
    return value if head == "untrained" else f"{value} {interval_of(metrics, name)}".rstrip()


def figures(run: Finished) -> list[Figure]:
    """Loss, the metric that picks the best, and how the training went."""
    metric = run.summary["metric"]
    charts = [figure("loss", [Curve(split, run.points(split, "loss")) for split in ("train", "validation")])]
    if metric != "loss":
        charts.append(figure(f"validation {metric}", [Curve(metric, run.points("validation", metric))]))
    charts += [figure(title, [Curve(title, run.points("train", key))]) for title, key in SIDE_CURVES]
    charts.append(figure("peak memory, GiB", [Curve("peak memory", memory_points(run))]))
    return [chart for chart in charts if chart is not None]


def memory_points(run: Finished) -> list[tuple[float, float]]:
    """(step, peak so far in GiB)."""
    return [(step, size / 2**30) for step, size in run.points("train", "peak_memory_bytes")]


def data_tables(run: Finished) -> list[Table]:
    """Rows and tokens by split, the files they came from, and what looks wrong in them."""
    data = run.manifest["data"]
    counts = [[split, *(f"{known[key]:,}" for key in DATA_COUNTS)] for split, known in data["counts"].items()]
    files = [(split, "; ".join(source["path"] for source in sources))
             for split, sources in data["fingerprints"].items()]
    return [Table("", ("", *(key.replace("_", " ") for key in DATA_COUNTS)), counts),
            Table("Files", ("split", "from"), files)]


def findings(run: Finished) -> list[tuple[str, str, list[str]]]:
    """What looks wrong in the data: its kind, what is to be said, and the first places."""
    data = run.manifest["data"]
    found = [(finding["kind"].replace("_", " "), finding["message"],
              [shortened(place, 300) for place in finding["places"][:SHOWN_PLACES]])
             for finding in data["findings"][:SHOWN_FINDINGS]]
    bad = [shortened(text, 300) for text in data["bad_rows"][:SHOWN_PLACES]]
    return found + ([("bad rows", "were left out", bad)] if bad else [])


def checks(run: Finished) -> list[str]:
    """What the run has proved of itself: it would have stopped, and have no page, if one of these had failed."""
    summary = run.summary
    return [
        "Every tensor that was to train took part in the loss of the first step."
        + (" After the second, each of them that has a gradient had moved, unless rounding swallows such a step, and "
           "no frozen one had changed." if summary["steps"] >= STEPS else ""),
        f"final/ was loaded again before it was published: its logits differ by {summary['reload_deviation']:.2g} at "
        "most from those of the trained model.",
        "Scores count each row once, whatever the number of processes.",
    ]


def facts(run: Finished) -> list[tuple[str, str]]:
    """What ran, where, and at what cost."""
    summary, manifest = run.summary, run.manifest
    packages = ", ".join(f"{name} {version}" for name, version in manifest["packages"].items())
    share = summary["trainable_parameters"] / max(1, summary["total_parameters"])
    return [
        ("weights", f"{summary['trainable_parameters']:,} of {summary['total_parameters']:,} trained ({share:.2%})"),
        ("training", f"{counted(summary['steps'], 'step')}, {counted(summary['examples'], 'example')}, "
                     f"{counted(summary['tokens'], 'token')} in {summary['seconds']:,.1f} s: "
                     f"{summary['tokens_per_second']:,.0f} tokens/s"),
        ("peak memory", f"{gib(summary['peak_memory_bytes'])} measured, in the main process{_planned(summary)}"),
        ("layout", f"{manifest['model']['layout']}, {manifest['model']['micro_batch_tokens']:,} tokens a micro-batch"
                   + (", activations recomputed" if manifest["model"]["gradient_checkpointing"] else "")),
        ("machine", f"{summary['world_size']} x {manifest['device']}, {summary['strategy']}; {manifest['platform']}"),
        ("peftune", f"{manifest['peftune']}, commit {manifest['commit'] or 'unknown'}"),
        ("python", f"{manifest['python']}; {packages}"),
        *([("starts", _starts(manifest["starts"]))] if len(manifest.get("starts", [])) > 1 else []),
    ]


def _starts(starts: Sequence[Mapping[str, Any]]) -> str:
    """What a run that was interrupted ran on from which step on, and what was another version than before."""
    said: list[str] = []
    before: dict[str, Any] = {}
    for start in starts:
        versions = {"peftune": start["peftune"], "python": start["python"], **start["packages"]}
        changed = [f"{name} {version}" for name, version in versions.items() if before.get(name, version) != version]
        said.append(f"{start['strategy']} on {start['world_size']} x {start['device']} after step {start['after_step']}"
                    + (f" with {', '.join(changed)}" if changed else ""))
        before = versions
    return "; ".join(said)


def _planned(summary: Metrics) -> str:
    """Beside the measured peak the predicted one, if there is one."""
    memory = summary.get("memory", {})
    if memory.get("predicted_bytes") is None:
        return ""
    return (f"; above what it held before the weights were loaded {gib(memory['measured_bytes'])}, and "
            f"{gib(memory['predicted_bytes'])} of tensors were predicted, at {memory['predicted_instant']}")


def subtitle(run: Finished) -> str:
    """Model, method, strategy and end, in one line."""
    settings, summary = run.settings, run.summary
    method = "all weights" if settings["adapter"] is None else str(settings["adapter"]["method"])
    return (f"{settings['model']['name_or_path']}, {method}, {summary['strategy']} on {summary['world_size']} x "
            f"{run.manifest['device']}; {counted(summary['steps'], 'step')}, {summary['exit'].replace('_', ' ')}")


def command(run: Finished) -> str:
    """What trains the same run again, in another folder."""
    summary, sharing = run.summary, run.manifest["model"].get("sequence_ranks", 1)
    return shlex.join([
        "peftune", "train", str(Path(run.folder, "config.yaml")), "output_dir=another/folder", "--strategy",
        preset_of(summary["strategy"]), *processes_words(summary["world_size"], sharing)])
