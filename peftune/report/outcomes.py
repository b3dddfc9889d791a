"""What a model got right and wrong, by task: who is taken for whom, each class, the worst examples with their text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peftune.numerics import squad
from peftune.report.run_folder import Finished
from peftune.report.words import number, shortened
from peftune.tasks.task import Record

MATRIX_CLASSES = 20
"""A confusion matrix of more classes is no picture any more: the commonest confusions are listed alone."""
SHOWN_CLASSES = 60
SHOWN_CONFUSIONS = 12
WORST = 15


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; the first column says what a row is, numbers stand in the others."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Matrix:
    """How often each class (row) was given each class (column), and each row's shares."""

    names: Sequence[str]
    counts: Sequence[Sequence[int]]

    @property
    def rows(self) -> list[tuple[str, list[tuple[int, float]]]]:
        """Class, and of each column the count and its share of the row."""
        return [(name, [(count, count / max(1, sum(row))) for count in row])
                for name, row in zip(self.names, self.counts, strict=True)]


@dataclass(frozen=True, slots=True)
class Bad:
    """An example that the model is most wrong about."""

    source: str
    loss: str
    parts: Sequence[tuple[str, str]]
    """What it is called, and the text."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one split."""

    split: str
    rows: int
    matrix: Matrix | None = None
    tables: Sequence[Table] = ()
    worst: Sequence[Bad] = ()
    worst_title: str = ""
    wrong: int | None = None
    """How many rows are wrong, where right and wrong is all there is."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a task's records are shown."""

    wrong: Callable[[Record], bool] | None
    """None where no record is simply right or wrong."""
    parts: Callable[[Record], list[tuple[str, str]]]
    details: Callable[[Finished, Sequence[Record], Mapping[str, Any]], tuple[Matrix | None, list[Table]]] = field(
        default=lambda run, records, metrics: (None, []))


def outcome(run: Finished) -> Outcome | None:
    """What became of the rows of the split that the page shows; None where no predictions were kept."""
    split = run.shown_split
    records = run.records(split) if split else []
    if split is None or not records:
        return None
    kind = _KINDS[run.summary["task"]]
    matrix, tables = kind.details(run, records, run.summary["metrics"][split])
    graded = kind.wrong is None or run.targets.problem == "regression"
    wrong = None if graded else [record for record in records if kind.wrong and kind.wrong(record)]
    chosen = sorted(records if wrong is None else wrong, key=_loss, reverse=True)[:WORST]
    worst = [Bad(str(record.get("source", record["id"])), number(_loss(record)),
                 [(name, shortened(text)) for name, text in kind.parts(record)]) for record in chosen]
    title = "Largest losses" if wrong is None else "Wrong, and by the largest losses"
    return Outcome(split, len(records), matrix, tables, worst, title, None if wrong is None else len(wrong))


def _loss(record: Record) -> float:
    return float(record.get("loss_sum") or 0.0) / max(1, record.get("num_targets") or 0)


def _class_details(
    run: Finished, records: Sequence[Record], metrics: Mapping[str, Any]
) -> tuple[Matrix | None, list[Table]]:
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support  # most of a second, as for tasks

    problem, names = run.targets.problem, list(run.targets.names)
    if problem == "regression":
        return None, []
    want, got = ([record[side] for record in records] for side in ("reference", "prediction"))
    if problem == "multi_label":
        many = (np.array([[name in row for name in names] for row in side], dtype=int) for side in (want, got))
        return None, [_class_table(names, precision_recall_fscore_support(*many, average=None, zero_division=0))]
    counts = confusion_matrix(want, got, labels=names)
    classes = _class_table(names, precision_recall_fscore_support(want, got, labels=names, zero_division=0))
    if len(names) <= MATRIX_CLASSES:
        return Matrix(names, counts.tolist()), [classes]
    confused = Counter({(want, got): int(counts[i, j]) for i, want in enumerate(names) for j, got in enumerate(names)
                        if i != j and counts[i, j]})
    rows = [(want, got, str(count)) for (want, got), count in confused.most_common(SHOWN_CONFUSIONS)]
    note = f"the commonest of {len(confused):,}" if len(confused) > len(rows) else ""
    confusions = [Table("Taken for another", ("class", "taken for", "rows"), rows, note)] if rows else []
    return None, [classes, *confusions]


def _class_table(names: Sequence[str], scores: Sequence[Iterable[float]]) -> Table:
    """Each class, the worst F1 first."""
    columns = sorted(zip(names, *scores, strict=True), key=lambda row: (row[3], row[0]))
    rows = [(name, f"{precision:.3f}", f"{recall:.3f}", f"{f1:.3f}", f"{int(count):,}")
            for name, precision, recall, f1, count in columns[:SHOWN_CLASSES]]
    note = f"the worst {len(rows)} of {len(columns)} classes" if len(columns) > len(rows) else ""
    return Table("Each class", ("class", "precision", "recall", "F1", "rows"), rows, note)


def _entity_details(
    run: Finished, records: Sequence[Record], metrics: Mapping[str, Any]
) -> tuple[Matrix | None, list[Table]]:
    from seqeval.metrics.sequence_labeling import get_entities  # with scikit-learn

    wanted = Counter(kind for record in records for kind, *_ in get_entities(record["reference"]))
    found = Counter(kind for record in records for kind, *_ in get_entities(record["prediction"]))
    kinds = sorted((name.removeprefix("f1/") for name in metrics if name.startswith("f1/")),
                   key=lambda kind: metrics[f"f1/{kind}"])
    rows = [(kind, *(f"{metrics[f'{name}/{kind}']:.3f}" for name in ("precision", "recall", "f1")),
             f"{wanted[kind]:,}", f"{found[kind]:,}") for kind in kinds[:SHOWN_CLASSES]]
    return None, [Table("Each type of entity", ("type", "precision", "recall", "F1", "wanted", "found"), rows)]


def _question_details(
    run: Finished, records: Sequence[Record], metrics: Mapping[str, Any]
) -> tuple[Matrix | None, list[Table]]:
    if run.targets.problem != "answer_or_none":
        return None, []
    rows = []
    for name, part, keys in (
        ("have an answer", [r for r in records if r["reference"]], ("answerable_exact_match", "answerable_f1")),
        ("have none", [r for r in records if not r["reference"]], ("unanswerable_accuracy",) * 2),
    ):
        silent = sum(not record["prediction"] for record in part)
        rows.append((name, f"{len(part):,}", f"{len(part) - silent:,}", f"{silent:,}",
                     *(number(metrics.get(key)) for key in keys)))
    heads = ("questions that", "rows", "answered", "not answered", "exact match", "F1")
    return None, [Table("With and without an answer", heads, rows)]


def _class_parts(record: Record) -> list[tuple[str, str]]:
    chance = f" ({record['probability']:.2f})" if "probability" in record else ""
    parts = [("text", record.get("text", "")), ("second text", record.get("text_pair") or ""),
             ("label", _said(record["reference"])), ("predicted", _said(record["prediction"]) + chance)]
    return [(name, text) for name, text in parts if text]


def _said(label: Any) -> str:
    if isinstance(label, list):
        return ", ".join(map(str, label)) or "none"
    return number(label) if isinstance(label, float) else str(label)


def _entity_parts(record: Record) -> list[tuple[str, str]]:
    from seqeval.metrics.sequence_labeling import get_entities

    def entities(tags: Sequence[str]) -> str:
        return "; ".join(f"{' '.join(record['tokens'][first:last + 1])} ({kind})"
                         for kind, first, last in get_entities(list(tags))) or "none"

    return [("text", " ".join(record["tokens"])), ("entities", entities(record["reference"])),
            ("predicted", entities(record["prediction"]))]


def _question_parts(record: Record) -> list[tuple[str, str]]:
    return [("question", record.get("question", "")), ("answer", " | ".join(record["reference"]) or "none"),
            ("predicted", record["prediction"] or "none")]


def _text_parts(record: Record) -> list[tuple[str, str]]:
    if record.get("prediction") is None:
        return [("prompt" if record.get("prompt") else "text", record.get("prompt") or record.get("text") or "")]
    return [("prompt", record.get("prompt", "")), ("answer", record["reference"] or ""),
            ("generated", record["prediction"])]


def _pair_parts(record: Record) -> list[tuple[str, str]]:
    return [("prompt", record.get("prompt", "")), ("chosen", str(record.get("chosen", ""))),
            ("rejected", str(record.get("rejected", ""))), ("margin of rewards", f"{record['margin']:.4f}")]


def _answered_wrongly(record: Record) -> bool:
    return not squad.best_over(squad.exact_match, record["prediction"], record["reference"])


def _differs(record: Record) -> bool:
    return not isinstance(record["reference"], float) and bool(record["prediction"] != record["reference"])


_KINDS: dict[str, _Kind] = {
    "sequence_classification": _Kind(_differs, _class_parts, _class_details),
    "token_classification": _Kind(_differs, _entity_parts, _entity_details),
    "question_answering": _Kind(_answered_wrongly, _question_parts, _question_details),
    "causal_lm": _Kind(None, _text_parts),
    "preference": _Kind(_differs, _pair_parts),
}
