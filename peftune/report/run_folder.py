"""A finished run, as its folder tells it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peftune.config.load import load
from peftune.data.targets import Targets
from peftune.errors import Fault, RunFolderError, refuse_odd_name
from peftune.loop.publish import damaged, read_json
from peftune.observe.json_lines import read_json_lines
from peftune.report.words import Metrics
from peftune.tasks import TASKS
from peftune.tasks.task import Record, Task

KEPT = {"summary.json": "metrics", "manifest.json": "data"}
"""Records of a run folder, each with a key that all have."""


@dataclass(frozen=True)
class Finished:
    """What a run has left behind, read once."""

    folder: Path
    summary: Metrics
    manifest: Metrics
    config: str
    """config.yaml as it stands."""
    rows: list[dict[str, Any]]
    """Of metrics.jsonl."""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The resolved config."""
        settings: dict[str, Any] = yaml.safe_load(self.config)
        return settings

    @functools.cached_property
    def task(self) -> Task:
        """What the run has learned."""
        config = load([str(self.folder / "config.yaml")])
        return TASKS[config.task](config.train, config.evaluation)

    @property
    def targets(self) -> Targets:
        """Classes and kind of label, as far as metrics need them."""
        return Targets(self.manifest["data"]["problem"], tuple(self.manifest["data"]["classes"]))

    @property
    def shown_split(self) -> str | None:
        """The split whose examples a page shows: test, else validation, if either was scored."""
        return next((name for name in ("test", "validation") if name in self.summary["metrics"]), None)

    def records(self, split: str) -> list[Record]:
        """Predictions of a split with the last weights; none where the run kept none."""
        path = self.folder / "predictions" / f"{split}.jsonl"
        try:
            return read_json_lines(path) if path.is_file() else []
        except ValueError as error:
            raise RunFolderError(Fault(
                kind="run_folder", file=str(path), message=f"cannot be read: {error}",
                mend="put the file back, or delete it: then the page shows no examples of it")) from None

    def points(self, split: str, key: str) -> list[tuple[float, float]]:
        """(step, value) of a column of metrics.jsonl, of the rows that have it."""
        return [(row["step"], row[key]) for row in self.rows if row["split"] == split and row.get(key) is not None]


def open_finished(folder: Path) -> Finished:
    """Read a run folder.

    Raises:
        RunFolderError: the folder holds no finished run, or what it holds is damaged.
        ConfigError: its config is.
        MachineError: the folder's name is no UTF-8.
    """
    refuse_odd_name(str(folder), "the run folder")
    if not (folder / "summary.json").is_file():
        raise RunFolderError(Fault(kind="run_folder", file=str(folder), message="no finished run here: no summary.json",
                                   mend="give the output_dir of a run that has ended"))
    summary, manifest = (_record(folder / name, key) for name, key in KEPT.items())
    load([str(folder / "config.yaml")])
    try:
        config = (folder / "config.yaml").read_text(encoding="utf-8")
        rows = read_json_lines(folder / "metrics.jsonl")
    except (OSError, ValueError) as error:
        raise damaged(folder / "metrics.jsonl", f"cannot be read: {error}") from None
    return Finished(folder, summary, manifest, config, rows)


def _record(path: Path, key: str) -> dict[str, Any]:
    values = read_json(path)
    if key not in values:
        raise damaged(path, f"lacks {key}: no run has written it")
    return values
