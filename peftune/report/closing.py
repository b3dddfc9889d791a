"""What a run and an evaluation say at their end, in the terminal."""

from __future__ import annotations

from peftune.numerics.counted import counted
from peftune.observe.display import Display
from peftune.report.words import Metrics, interval_of, metric_names, value_of


def show_summary(display: Display, folder: str, summary: Metrics, *, done_before: bool = False) -> None:
    """Say what came of a run: trained beside untrained, with intervals."""
    for split, metrics in summary["metrics"].items():
        baseline, majority = summary["baseline"].get(split, {}), summary["majority"].get(split, {})
        rows = [[name, value_of(metrics, name), interval_of(metrics, name), value_of(baseline, name),
                 value_of(majority, name)] for name in metric_names(metrics)]
        display.table(split, ["", "trained", "95 % interval", "untrained", "majority"], rows)
        _warn_of_unscored(display, split, metrics)
    display.say(f"{counted(summary['steps'], 'step')}, {summary['seconds']:.0f} s of training, "
                f"{summary['tokens_per_second']:,.0f} tokens/s, peak {summary['peak_memory_bytes'] / 2**30:.1f} GiB, "
                f"{summary['exit'].replace('_', ' ')}")
    if summary["best_step"] not in (None, summary["steps"]):
        display.say(f"best/ is step {summary['best_step']}: " + "; ".join(
            f"{split} {summary['metric']} {value_of(metrics, summary['metric'])}"
            for split, metrics in summary["best"].items()))
    display.say(f"trained weights: {folder}/final   page: {folder}/report.html")
    if done_before:
        display.say("this run was done before: nothing was trained. Another output_dir starts another run")


def show_metrics(display: Display, split: str, metrics: Metrics) -> None:
    """Say the metrics of one split."""
    rows = [[name, value_of(metrics, name), interval_of(metrics, name)] for name in metric_names(metrics)]
    display.table(split, ["", "value", "95 % interval"], rows)
    _warn_of_unscored(display, split, metrics)


def _warn_of_unscored(display: Display, split: str, metrics: Metrics) -> None:
    if left_out := metrics.get("not_generated"):
        display.warn(f"{left_out:,} rows of {split} have no generated text, so that its scores leave them out: their "
                     "prompts reach data.max_length, or they are text without a prompt")
