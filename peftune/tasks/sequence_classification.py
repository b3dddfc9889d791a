"""A label, several labels or a number for a text or a pair of texts."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from peftune.config.schema import DataConfig
from peftune.data.canonical import class_names
from peftune.data.examples import Batch, Example
from peftune.data.rows import Row
from peftune.data.targets import RowFault, Targets
from peftune.errors import DataError, Fault
from peftune.numerics import scores
from peftune.numerics.intervals import resampled_positions, resampled_sums
from peftune.numerics.losses import class_nats, label_nats, squared_error
from peftune.tasks.task import Metrics, Record, Task, TextEncoder, mean_loss, put, rounded

METRIC_NAMES = {
    "single_label": ("accuracy", "macro_f1", "mcc", "loss"),
    "multi_label": ("micro_f1", "macro_f1", "exact_match", "loss"),
    "regression": ("pearson", "spearman", "rmse", "loss"),
}


MOST_CLASSES = 100_000
"""Rows of a regression have as many labels; so many are kept until it is clear that they are no classes."""


def learn_targets(rows: Iterable[Row], config: DataConfig) -> Targets:
    """Find the kind of label and, unless `data.labels` gives them, the sorted class names."""
    seen: set[str] = set()
    several = fractions = False
    numbers, file = True, None
    for row in rows:
        file = file or row.file
        label = row.fields["label"]
        several |= isinstance(label, list)
        numbers &= isinstance(label, int | float) and not isinstance(label, bool)
        fractions |= isinstance(label, float) and not label.is_integer()
        if config.problem_type != "regression" and len(seen) < MOST_CLASSES:
            seen.update(class_names(label))
    is_regression = numbers and fractions and config.labels is None
    found = "multi_label" if several else "regression" if is_regression else "single_label"
    problem = config.problem_type if config.problem_type != "auto" else found
    if problem == "regression":
        return Targets(problem, kind="values")
    names = config.labels or tuple(sorted(seen, key=_natural))
    if len(names) >= MOST_CLASSES:
        raise DataError(Fault(kind="data", file=file, message=f"the training rows have {len(names):,} classes or more",
                              mend="data.problem_type=regression for numbers; or data.columns names another column"))
    if len(names) < (2 if problem == "single_label" else 1):
        raise DataError(Fault(kind="data", file=file, message=f"the training rows have {len(names)} class",
                              mend="give rows of at least two classes, or name the classes in data.labels"))
    return Targets(problem, names, "class" if problem == "single_label" else "values")


def _natural(name: str) -> tuple[int, float, str]:
    """Numbers in the order of their value, before words."""
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    return (0, number, name) if math.isfinite(number) else (1, 0.0, name)  # "nan" is a word: it has no place among them


def encode(row: Row, targets: Targets, text: TextEncoder) -> list[Example]:
    """One row -> ids of its text or pair, and its label as a class id, a 0/1 vector or a number."""
    label = row.fields["label"]
    example = encode_prompt(row.fields, text)[0]
    ids, reference = _target(label, targets)
    record = {"id": row.id, "reference": reference, "source": f"{row.file}:{row.line}", "text": row.fields["text"]}
    if row.fields.get("text_pair") is not None:
        record["text_pair"] = row.fields["text_pair"]
    return [Example(example.input_ids, ids, len(ids), example.full_length, record, example.segment_ids, row.source)]


def _target(label: Any, targets: Targets) -> tuple[list[float], Any]:
    if targets.problem == "regression":
        try:
            value = float(label)
        except OverflowError:
            value = math.inf
        except (TypeError, ValueError):
            raise RowFault(f"label {label!r:.40} is not a number",
                           "write a number, or data.problem_type=auto") from None
        if not math.isfinite(value):
            raise RowFault(f"label {label!r:.40} is not a finite number", "write a finite number, or delete the row")
        return [value], value
    if targets.problem == "single_label" and isinstance(label, list):
        raise RowFault("label is a list in a single-label task", "data.problem_type=multi_label")
    names = class_names(label)
    for name in names:
        if name not in targets.names:
            shown = ", ".join(targets.names[:10]) + (", ..." if len(targets.names) > 10 else "")
            raise RowFault(f"label {name!r:.60} is not one of the {len(targets.names)} classes ({shown})",
                           "mend the label, or name all classes in data.labels")
    if targets.problem == "single_label":
        return [targets.names.index(names[0])], names[0]
    return [float(name in names) for name in targets.names], sorted(set(names))


def encode_prompt(fields: Mapping[str, Any], text: TextEncoder) -> list[Example]:
    """Ids of `text` and perhaps `text_pair`, special tokens included; the longest part is cut first."""
    if not isinstance(fields.get("text"), str) or not fields["text"].strip():
        raise RowFault("the key text is missing or empty", 'write {"text": "..."}, or name its column with --config '
                       "and data.columns={text: NAME}")
    pair = fields.get("text_pair")
    if pair is not None and not isinstance(pair, str):
        raise RowFault(f"text_pair is {pair!r:.40}, not a text", "write it in quotes, or leave it out")
    encoding = text.tokenizer(fields["text"], pair)
    full_length = len(encoding["input_ids"])
    if full_length > text.max_length:
        encoding = text.tokenizer(fields["text"], pair, truncation=True, max_length=text.max_length)
    segments = encoding.get("token_type_ids") if pair is not None else None
    return [Example(encoding["input_ids"], [], 0, full_length, {}, segments)]


def losses(logits_BK: Tensor, batch: Batch, targets: Targets) -> Tensor:
    """[B] float32: cross-entropy, binary cross-entropy summed over the labels, or squared error."""
    loss = {"single_label": class_nats, "multi_label": label_nats, "regression": squared_error}[targets.problem]
    return loss(logits_BK, batch.targets)


def predictions(
    logits_BK: Tensor, batch: Batch, targets: Targets, records: Sequence[Mapping[str, Any]]
) -> list[Record]:
    """The likeliest class and its probability; the labels above one half; or the number."""
    if targets.problem == "regression":
        return [{"prediction": value} for value in logits_BK[:, 0].float().tolist()]
    if targets.problem == "multi_label":
        chances = logits_BK.float().sigmoid().tolist()
        return [{"prediction": [n for n, p in zip(targets.names, row, strict=True) if p > 0.5],
                 "probabilities": dict(zip(targets.names, row, strict=True))} for row in chances]
    chances_BK = logits_BK.float().softmax(-1)
    best = chances_BK.max(-1)
    return [{"prediction": targets.names[k], "probability": p}
            for k, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def metrics(records: Sequence[Record], targets: Targets, resample: bool) -> Metrics:
    """scikit-learn's and scipy's scores over the records; undefined ones are None."""
    result: Metrics = {}
    sums_N2 = np.array([(record["loss_sum"], record["num_targets"]) for record in records])
    put(result, "loss", mean_loss(records), (lambda: resampled_sums(sums_N2, scores.ratio)) if resample else None)
    measure = _regression_scores if targets.problem == "regression" else _class_scores
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant inputs make a correlation undefined: said as None, not as a warning
        for name, value, resampled in measure(records, targets):
            put(result, name, value, resampled if resample else None)
    return result


Score = tuple[str, float, Callable[[], np.ndarray]]
"""Name, value, and how to get its values in resamples."""


def _class_scores(records: Sequence[Record], targets: Targets) -> Iterator[Score]:
    from sklearn.metrics import accuracy_score, matthews_corrcoef  # with pandas: most of a second, for each command

    several = targets.problem == "multi_label"
    want_NK, got_NK = (np.array([[name in r[side] if several else name == r[side] for name in targets.names]
                                 for r in records], dtype=int) for side in ("reference", "prediction"))
    counts_NF = np.concatenate([want_NK * got_NK, got_NK, want_NK], axis=1)
    right_N2 = np.column_stack([(want_NK == got_NK).all(axis=1), np.ones(len(records))])
    if several:
        yield "micro_f1", _f1(want_NK, got_NK, "micro"), lambda: resampled_sums(counts_NF, scores.micro_f1)
        yield "macro_f1", _f1(want_NK, got_NK, "macro"), lambda: resampled_sums(counts_NF, scores.macro_f1_of_all)
        yield "exact_match", float(accuracy_score(want_NK, got_NK)), lambda: resampled_sums(right_N2, scores.ratio)
    else:
        want, got = want_NK.argmax(axis=1), got_NK.argmax(axis=1)
        yield "accuracy", float(accuracy_score(want, got)), lambda: resampled_sums(right_N2, scores.ratio)
        yield "macro_f1", _f1(want, got, "macro"), lambda: resampled_sums(counts_NF, scores.macro_f1)
        yield "mcc", float(matthews_corrcoef(want, got)), lambda: resampled_sums(counts_NF, scores.matthews)


def _f1(want: np.ndarray, got: np.ndarray, average: str) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(want, got, average=average, zero_division=0))


def _regression_scores(records: Sequence[Record], targets: Targets) -> Iterator[Score]:
    from scipy import stats
    from sklearn.metrics import root_mean_squared_error

    want, got = (np.array([r[side] for r in records], dtype=float) for side in ("reference", "prediction"))
    x, y = want - want.mean(), got - got.mean()
    products = np.column_stack([np.ones_like(x), x, y, x * y, x * x, y * y])
    several = len(records) > 1
    yield ("pearson", rounded(stats.pearsonr(want, got).statistic) if several else float("nan"),
           lambda: resampled_sums(products, scores.pearson))
    yield ("spearman", float(stats.spearmanr(want, got).statistic) if several else float("nan"),
           lambda: resampled_positions(lambda at: float(stats.spearmanr(want[at], got[at]).statistic), len(want)))
    errors = np.column_stack([np.square(want - got), np.ones_like(want)])
    yield ("rmse", rounded(root_mean_squared_error(want, got)),
           lambda: resampled_sums(errors, lambda sums: np.sqrt(scores.ratio(sums))))


def majority(train: Iterable[Record], scored: Sequence[Record], targets: Targets) -> list[Record]:
    """Predict the commonest class, each label's commonest value, or the mean, whatever the text."""
    references = [record["reference"] for record in train]
    if targets.problem == "single_label":
        counts = Counter(references)
        guess: Any = max(targets.names, key=lambda name: counts[name])
    elif targets.problem == "multi_label":
        counts = Counter(name for names in references for name in names)
        guess = [name for name in targets.names if counts[name] > len(references) / 2]
    else:
        guess = float(np.mean(references))
    return [{**record, "prediction": guess} for record in scored]


def metric_names(targets: Targets) -> tuple[str, ...]:
    """By kind of label."""
    return METRIC_NAMES[targets.problem]


SEQUENCE_CLASSIFICATION = Task(
    name="sequence_classification",
    auto_class=AutoModelForSequenceClassification,
    formats=("classification",),
    learn_targets=learn_targets,
    encode=encode,
    encode_prompt=encode_prompt,
    losses=losses,
    predictions=predictions,
    metrics=metrics,
    metric_names=metric_names,
    majority=majority,
    pooled=True,
    surveyed_as="classification",
    scored_by=("sklearn.metrics",),
)
