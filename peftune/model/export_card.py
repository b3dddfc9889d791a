"""The model card of an exported folder, with what its run says of data, training and scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peftune.model.card import KINDS, is_local, usage
from peftune.numerics.counted import counted


@dataclass(frozen=True, slots=True)
class Story:
    """What a run folder says of its training; None where there is no run."""

    config: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    manifest: Mapping[str, Any] | None
    best: bool
    """The weights are those of the best evaluation, not of the last step."""

    @property
    def metrics(self) -> Mapping[str, Mapping[str, Any]]:
        """Metrics of these weights, by split."""
        return (self.summary or {}).get("best" if self.best else "metrics", {})


def export_card(record: Mapping[str, Any], trained: Story) -> str:
    """The card of an exported folder: scores, data, training, and how the folder was compared.

    Args:
        record: what export.json says.
        trained: the run.
    """
    adapter = record["kind"] == "adapter"
    model = trained.config["model"]
    task, method = record["task"], record["method"]
    given = model["name_or_path"]
    base = str(given if trained.manifest or not record["base"] else record["base"])
    header: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": KINDS[task][0],
                              "tags": ["peftune", method.replace(" ", "-")]}
    if not is_local(base):
        header |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    how = usage(adapter, task, record["loads_with"], revision=model["revision"], quantised_by=record["quantization"],
                adds_tokens=bool(model["added_tokens"] or model["added_special_tokens"]))
    shown = Path(base).name if is_local(base) else base
    parts = [f"---\n{yaml.safe_dump(header, sort_keys=False).strip()}\n---", f"# {shown}, {method} for {task}",
             *_scores(trained), *_data(trained), *_training(trained), *_export(record), "## Use",
             f"```python\n{how}\n```"]
    return "\n\n".join(parts) + "\n"


def _scores(trained: Story) -> Iterator[str]:
    for split, metrics in trained.metrics.items():
        untrained = (trained.summary or {}).get("baseline", {}).get(split, {})
        yield f"## Scores: {split}"
        lines = ["| metric | value | 95 % interval | untrained model |", "| --- | --- | --- | --- |"]
        for name, value in metrics.items():
            if isinstance(value, int | float) and not name.endswith("_interval"):
                interval = metrics.get(f"{name}_interval")
                between = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
                before = untrained.get(name)
                lines.append(f"| {name} | {value:.4f} | {between} | {'' if before is None else f'{before:.4f}'} |")
        yield "\n".join(lines)


def _data(trained: Story) -> Iterator[str]:
    if trained.manifest is None:
        return
    data = trained.manifest["data"]
    yield "## Data"
    sources = trained.config["data"]
    lines = []
    for split, counts in data["counts"].items():
        given = sources.get(split)
        names = ([str(item["path"] if isinstance(item, Mapping) else item) for item in given]
                 if isinstance(given, list | tuple) else [str(given)])
        said = ", ".join(Path(name).name if Path(name).exists() else name for name in names)
        lines.append(f"- {split}: {counts['kept']:,} of {counts['rows']:,} rows ({said})")
    if data.get("classes"):
        lines.append(f"- classes: {', '.join(map(str, data['classes']))}")
    yield "\n".join(lines)


def _training(trained: Story) -> Iterator[str]:
    if trained.summary is None or trained.manifest is None:
        return
    summary, train, versions = trained.summary, trained.config["train"], trained.manifest["packages"]
    yield "## Training"
    adapter = trained.config["adapter"]
    step = summary["best_step"] if trained.best else summary["steps"]
    yield "\n".join([
        f"- {summary['trainable_parameters']:,} of {summary['total_parameters']:,} weights; step {step} of "
        f"{summary['steps']}, {train['batch_size']} examples a step, seed {trained.config['seed']}",
        f"- {train['optimizer']}, peak learning rate {train['learning_rate']}, {train['lr_scheduler']}, "
        f"{trained.config['model']['dtype']}, {summary['strategy']} on {summary['world_size']}",
        "- all weights" if adapter is None else "- " + ", ".join(
            f"{key} {value}" for key, value in adapter.items() if value is not None),
        "- " + ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions),
    ])


def _export(record: Mapping[str, Any]) -> Iterator[str]:
    yield "## This folder"
    what = {"adapter": "The adapter as it was trained; it needs its base model.",
            "merged": f"The adapter, merged into {record['merged_into']}, as {record['dtype']}.",
            "model": f"The whole model, as {record['dtype']}."}[record["kind"]]
    rows = f"{counted(record['rows']['count'], 'row')} ({record['rows']['from']})"
    yield (f"{what} On {rows} its logits differ from the trained model's by "
           f"at most {record['deviation']:.3g} (tolerance {record['tolerance']:.3g}); `export.json` has the "
           "checks and versions.")
