"""Results become a closing table and one self-contained page."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from peftune.errors import Fault, RunFolderError
from peftune.loop.publish import write_text
from peftune.observe.chart import Curve, line_chart
from peftune.observe.display import Display

SHOWN_PLACES = 5
"""Rows of a finding that the page names."""

Metrics = Mapping[str, Any]

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d5dbe3; --page: #ffffff; --card: #f6f8fa;
  --c0: #1f6feb; --c1: #d1570a; --c2: #2c8a4b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa6b5; --line: #333c48; --page: #12161c;
  --card: #1a2029; --c0: #6aa8ff; --c1: #ff9b57; --c2: #5fcf86; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
p.sub { color: var(--soft); margin: 0; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .35rem .7rem;
  border-bottom: 1px solid var(--line); vertical-align: top; } td.n, th.n { text-align: right;
  font-variant-numeric: tabular-nums; } td small { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .7rem; }
figcaption { font-weight: 600; margin-bottom: .3rem; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 10px system-ui, sans-serif; }
svg text.c0 { fill: var(--c0); } svg text.c1 { fill: var(--c1); } svg text.c2 { fill: var(--c2); }
.axis { stroke: var(--line); }
.c0 { stroke: var(--c0); fill: var(--c0); } .c1 { stroke: var(--c1); fill: var(--c1); }
.c2 { stroke: var(--c2); fill: var(--c2); } polyline { fill: none !important; stroke-width: 1.6; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; overflow: auto; }
.verdict { border-left: 4px solid var(--c0); background: var(--card); padding: .6rem .9rem; }
"""


def show_summary(display: Display, folder: str, summary: Metrics, *, done_before: bool = False) -> None:
    """Say what came of a run: trained beside untrained, with intervals."""
    for split, metrics in summary["metrics"].items():
        baseline, majority = summary["baseline"].get(split, {}), summary["majority"].get(split, {})
        rows = [[name, _value(metrics, name), _interval(metrics, name), _value(baseline, name), _value(majority, name)]
                for name in _names(metrics)]
        display.table(split, ["", "trained", "95 % interval", "untrained", "majority"], rows)
    display.say(f"{summary['steps']} steps, {summary['seconds']:.0f} s of training, "
                f"{summary['tokens_per_second']:,.0f} tokens/s, peak {summary['peak_memory_bytes'] / 2**30:.1f} GiB, "
                f"{summary['exit'].replace('_', ' ')}")
    if summary["best_step"] not in (None, summary["steps"]):
        display.say(f"best/ is step {summary['best_step']}: " + "; ".join(
            f"{split} {summary['metric']} {_value(metrics, summary['metric'])}"
            for split, metrics in summary["best"].items()))
    display.say(f"trained weights: {folder}/final   page: {folder}/report.html")
    if done_before:
        display.say("this run was done before: nothing was trained. Another output_dir starts another run")


def show_metrics(display: Display, split: str, metrics: Metrics) -> None:
    """Say the metrics of one split."""
    rows = [[name, _value(metrics, name), _interval(metrics, name)] for name in _names(metrics)]
    display.table(split, ["", "value", "95 % interval"], rows)


def write_report(folder: Path, to: Path | None = None) -> Path:
    """Write the page of a finished run and return its path.

    Raises:
        RunFolderError: the folder holds no finished run.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        config = (folder / "config.yaml").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RunFolderError(Fault(kind="run_folder", file=str(folder), message=f"no finished run here: {error}",
                                   mend="give the output_dir of a run that has ended")) from None
    page = to or folder / "report.html"
    write_text(page, render(folder.name, summary, manifest, config, rows))
    return page


def render(name: str, summary: Metrics, manifest: Metrics, config: str, rows: Sequence[Metrics]) -> str:
    """The page: no script, no font and no picture from elsewhere."""
    settings = yaml.safe_load(config)
    title = f"{html.escape(name)}: {summary['task'].replace('_', ' ')}"
    model = html.escape(str(settings["model"]["name_or_path"]))
    method = "full fine-tuning" if settings["adapter"] is None else str(settings["adapter"]["method"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p class="sub">{model}, {html.escape(method)}, {summary["strategy"]} on {summary["world_size"]} x
{html.escape(manifest["device"])}; {summary["steps"]} steps, {summary["exit"].replace("_", " ")}</p>
<h2>Scores</h2>{_verdict(summary)}{_score_table(summary)}
<h2>Curves</h2><div class="charts">{_charts(rows, summary["metric"])}</div>
<h2>Data</h2>{_data_table(manifest)}
<h2>What ran</h2>{_facts_table(summary, manifest)}
<h2>Run it again</h2><pre>accelerate launch peftune/train.py config.yaml output_dir=another/folder</pre>
<pre>{html.escape(config)}</pre>
</body></html>
"""


def _verdict(summary: Metrics) -> str:
    """One plain sentence: is the trained model better than the untrained one, beyond chance?"""
    metric = summary["metric"]
    for split in ("test", "validation"):
        metrics, baseline = summary["metrics"].get(split, {}), summary["baseline"].get(split, {})
        value, before = metrics.get(metric), baseline.get(metric)
        if value is None or before is None:
            continue
        interval = metrics.get(f"{metric}_interval")
        inside = interval is not None and interval[0] <= before <= interval[1]
        said = "no better than the untrained model, as far as this data can tell" if inside else (
            f"{_number(before)} untrained")
        return (f'<p class="verdict">{html.escape(split)} {html.escape(metric)} <b>{_number(value)}</b> '
                f"{_interval(metrics, metric)}: {said}.</p>")
    return ""


def _score_table(summary: Metrics) -> str:
    body = []
    for split, metrics in summary["metrics"].items():
        for name in _names(metrics):
            columns = [metrics, summary["best"].get(split, {}), summary["baseline"].get(split, {}),
                       summary["majority"].get(split, {})]
            cells = "".join(f'<td class="n">{_value(c, name)} <small>{_interval(c, name)}</small></td>'
                            for c in columns)
            body.append(f"<tr><td>{html.escape(split)} {html.escape(name)}</td>{cells}</tr>")
    head = "".join(f'<th class="n">{text}</th>' for text in (
        "final", f"best (step {summary['best_step']})", "untrained", "majority"))
    return f"<table><tr><th></th>{head}</tr>{''.join(body)}</table>"


def _charts(rows: Sequence[Metrics], metric: str) -> str:
    def points(split: str, key: str) -> list[tuple[float, float]]:
        return [(row["step"], row[key]) for row in rows if row["split"] == split and row.get(key) is not None]

    charts = [("loss", [Curve("train", points("train", "loss")), Curve("validation", points("validation", "loss"))])]
    if metric != "loss":
        charts.append((metric, [Curve("validation", points("validation", metric))]))
    charts += [(title, [Curve(title, points("train", key))]) for title, key in (
        ("learning rate", "learning_rate"), ("gradient norm", "grad_norm"), ("tokens/s", "tokens_per_second"))]
    return "".join(f"<figure><figcaption>{html.escape(title)}</figcaption>{line_chart(curves)}</figure>"
                   for title, curves in charts if any(curve.points for curve in curves))


def _data_table(manifest: Metrics) -> str:
    data = manifest["data"]
    heads = ("rows", "kept", "bad", "truncated", "dropped_too_long", "dropped_no_target", "tokens",
             "supervised_targets", "longest")
    head = "".join(f'<th class="n">{text.replace("_", " ")}</th>' for text in heads)
    body = "".join(f"<tr><td>{html.escape(split)}</td>" + "".join(
        f'<td class="n">{counts[key]:,}</td>' for key in heads) + "</tr>" for split, counts in data["counts"].items())
    files = _rows((split, "; ".join(source["path"] for source in sources))
                  for split, sources in data["fingerprints"].items())
    found = _rows((finding["kind"].replace("_", " "), "; ".join(
        [finding["message"], *finding["places"][:SHOWN_PLACES]])) for finding in data["findings"])
    found += _rows(("bad row", text) for text in data["bad_rows"][:SHOWN_PLACES])
    looked = f"<h3>Looks wrong</h3><table>{found}</table>" if found else "<p>Nothing in it looks wrong.</p>"
    return f"<table><tr><th></th>{head}</tr>{body}</table><table>{files}</table>{looked}"


def _facts_table(summary: Metrics, manifest: Metrics) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in manifest["packages"].items())
    return "<table>" + _rows((
        ("weights", f"{summary['trainable_parameters']:,} of {summary['total_parameters']:,} trained"),
        ("training", f"{summary['seconds']:.1f} s, {summary['tokens']:,} tokens, "
                     f"{summary['tokens_per_second']:,.0f} tokens/s"),
        ("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"),
        ("reload", f"the saved folder gives the same logits, largest difference {summary['reload_deviation']:.2g}"),
        ("peftune", f"{manifest['peftune']}, commit {manifest['commit'] or 'unknown'}"),
        ("python", f"{manifest['python']}; {packages}"), ("platform", manifest["platform"]),
    )) + "</table>"


def _rows(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<tr><td>{html.escape(key)}</td><td>{html.escape(str(value))}</td></tr>" for key, value in pairs)


def _names(metrics: Metrics) -> list[str]:
    return [name for name in metrics if not name.endswith("_interval")]


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def _value(metrics: Metrics, name: str) -> str:
    value = metrics.get(name)
    return "-" if value is None else _number(value)


def _interval(metrics: Metrics, name: str) -> str:
    interval = metrics.get(f"{name}_interval")
    return f"[{_number(interval[0])}, {_number(interval[1])}]" if interval else ""
