"""One self-contained page of a run, or of several side by side: no script, font or picture from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from peftune.loop.publish import write_text, writing
from peftune.report import sections
from peftune.report.comparison import compare
from peftune.report.outcomes import outcome
from peftune.report.run_folder import Finished, open_finished
from peftune.report.verdict import verdict

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True)
PAGE = "report.html"
"""In the run folder."""


def write_report(folder: Path, to: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Write the page of a finished run.

    Returns:
        Its path, and what `peftune report --json` prints: the summary, the verdict, and the page's path.

    Raises:
        RunFolderError: the folder holds no finished run, or the page cannot be written.
    """
    run = open_finished(folder)
    remarks = verdict(run)
    page = to or folder / PAGE
    _write(page, TEMPLATES.get_template("run.html").render(
        title=f"{run.name}: {run.summary['task'].replace('_', ' ')}", subtitle=sections.subtitle(run), remarks=remarks,
        scores=sections.score_table(run), figures=sections.figures(run), outcome=outcome(run),
        data=sections.data_tables(run), findings=sections.findings(run), checks=sections.checks(run),
        facts=sections.facts(run), command=sections.command(run), config=run.config))
    return page, {"page": str(page), "verdict": [asdict(remark) for remark in remarks], "summary": run.summary}


def write_comparison(folders: Sequence[Path], to: Path) -> tuple[Path, dict[str, Any]]:
    """Write the page that lays several runs beside each other, the first one being what the others are compared with.

    Raises:
        RunFolderError: a folder holds no finished run, or the page cannot be written.
    """
    runs: list[Finished] = [open_finished(folder) for folder in folders]
    compared = compare(runs)
    _write(to, TEMPLATES.get_template("comparison.html").render(
        title=" · ".join(compared.summaries), compared=compared))
    return to, {"page": str(to), **compared.as_json()}


def _write(page: Path, text: str) -> None:
    with writing(page):
        write_text(page, text)
