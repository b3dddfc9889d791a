"""A tag for each word: named entities, in BIO or BIOES."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoModelForTokenClassification

from peftune.config.schema import DataConfig
from peftune.data.examples import Batch, Example
from peftune.data.layouts import rows_of
from peftune.data.rows import Row
from peftune.data.targets import RowFault, Targets
from peftune.errors import DataError, Fault
from peftune.numerics import scores
from peftune.numerics.intervals import resampled_sums
from peftune.numerics.losses import IGNORE, token_nats
from peftune.tasks.task import Metrics, Record, Task, TextEncoder, mean_loss, put

OUTSIDE = "O"
NAMES = ("f1", "precision", "recall", "strict_f1", "strict_precision", "strict_recall", "accuracy", "loss")
SCHEMES = {"bio": "IOB2", "bioes": "IOBES"}
"""How seqeval calls them."""


def learn_targets(rows: Iterable[Row], config: DataConfig) -> Targets:
    """The tags of `data.labels`, or O and those of the training rows with the B and I of each type, sorted by type."""
    seen: set[str] = set()
    place: Row | None = None
    for row in rows:
        place = place or row
        seen.update(tag for tag in row.fields["tags"] if isinstance(tag, str))
    if config.labels is not None:
        return Targets(scheme_of(config.labels), config.labels)
    types = sorted({tag[2:] for tag in seen if tag != OUTSIDE})
    if not types or any(tag != OUTSIDE and tag[1:2] != "-" for tag in seen):
        odd = sorted(tag for tag in seen if tag != OUTSIDE and tag[1:2] != "-")
        raise DataError(Fault(
            kind="data", file=place.file if place else None,
            message=f"tags {', '.join(map(repr, odd[:5]))} are neither O nor a type with a prefix such as B-" if odd
            else "the training rows tag no entity",
            mend="write B-PER, I-PER, O, ...; or name all tags in data.labels, in the order of their numbers"))
    scheme = scheme_of(seen)
    prefixes = "BIES" if scheme == "bioes" else "BI"
    return Targets(scheme, (OUTSIDE, *(f"{prefix}-{kind}" for kind in types for prefix in prefixes)))


def scheme_of(tags: Iterable[str]) -> str:
    """bioes where a tag marks an end (E-) or a single word (S-), else bio."""
    return "bioes" if any(tag[:2] in ("E-", "S-") for tag in tags) else "bio"


def encode(row: Row, targets: Targets, text: TextEncoder) -> list[Example]:
    """One row -> ids of its words and, on the first sub-token of each (or on all), the id of the word's tag."""
    words, tags = row.fields["tokens"], [_name(tag, targets) for tag in row.fields["tags"]]
    example = encode_words(words, text)
    labels = [IGNORE] * len(example.input_ids)
    before = None
    for position, word in enumerate(example.record["words"]):
        if word is None:
            continue
        if word != before:
            labels[position] = targets.names.index(tags[word])
        elif text.data.subtokens == "all":
            labels[position] = targets.names.index(_continued(tags[word], targets))
        before = word
    supervised = sum(label != IGNORE for label in labels)
    record = {**example.record, "id": row.id, "reference": tags, "source": f"{row.file}:{row.line}"}
    return [Example(example.input_ids, labels, supervised, example.full_length, record, source=row.source)]


def _name(tag: str | int, targets: Targets) -> str:
    """A tag's name; numbers count along `data.labels`."""
    if isinstance(tag, int) and 0 <= tag < len(targets.names):
        return targets.names[tag]
    if tag not in targets.names:
        shown = ", ".join(targets.names[:12]) + (", ..." if len(targets.names) > 12 else "")
        raise RowFault(f"tag {tag!r:.60} is not one of the {len(targets.names)} tags ({shown})",
                       "mend the tag, or name all tags in data.labels")
    return str(tag)


def _continued(tag: str, targets: Targets) -> str:
    """The tag of a word's further sub-tokens: what begins an entity goes on inside it."""
    inside = f"I-{tag[2:]}"
    return inside if tag[:2] in ("B-", "S-") and inside in targets.names else tag


def encode_words(words: Sequence[str], text: TextEncoder) -> Example:
    """Ids of words joined by spaces, special tokens included, and the word of each token or null.

    Tokens are kept as long as they fit, perhaps the first of a word alone; special tokens at the end stay.
    """
    joined = " ".join(words)
    ends = np.cumsum([len(word) + 1 for word in words])
    encoding = text.tokenizer(joined, return_offsets_mapping=True, return_special_tokens_mask=True)
    owners = [None if special or end <= begin else _word_at(ends, joined, begin, end)
              for (begin, end), special
              in zip(encoding["offset_mapping"], encoding["special_tokens_mask"], strict=True)]
    ids, full_length = list(encoding["input_ids"]), len(encoding["input_ids"])
    if full_length > text.max_length:
        tail = next((n for n, owner in enumerate(reversed(owners)) if owner is not None), 0)
        kept = max(0, text.max_length - tail)
        ids, owners = ids[:kept] + ids[full_length - tail:], owners[:kept] + [None] * tail
    return Example(ids, [], 0, full_length, {"tokens": list(words), "words": owners})


def _word_at(ends: np.ndarray, joined: str, begin: int, end: int) -> int | None:
    """The word that a token's characters lie in; byte-level tokens hold the space before their word."""
    while begin < end and joined[begin] == " ":
        begin += 1
    return int(np.searchsorted(ends, begin, side="right")) if begin < end else None


def encode_prompt(fields: Mapping[str, Any], text: TextEncoder) -> list[Example]:
    """A record with `tokens`, or with `text`, which is cut at blanks."""
    words = fields.get("tokens")
    if words is None and isinstance(fields.get("text"), str):
        words = fields["text"].split()
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise RowFault("neither tokens, a list of words, nor a text is there", 'write {"tokens": ["...", ...]}, or '
                       "name their column with --config and data.columns={tokens: NAME}")
    return [encode_words(words, text)]


def losses(logits_BTK: Tensor, batch: Batch, targets: Targets) -> Tensor:
    """[examples] float32: nats of each example, summed over its supervised tokens."""
    return token_nats(logits_BTK, batch.targets, batch.owners, len(batch.lengths))


def predictions(
    logits_BTK: Tensor, batch: Batch, targets: Targets, records: Sequence[Mapping[str, Any]]
) -> list[Record]:
    """The likeliest tag of each word's first sub-token, O for words that were cut; and the entities they spell."""
    from seqeval.metrics.sequence_labeling import get_entities  # with scikit-learn and pandas: most of a second

    best_BT = rows_of(logits_BTK, batch, fill=0.0).argmax(-1).tolist()
    found = []
    for best, record in zip(best_BT, records, strict=True):
        tags = [OUTSIDE] * len(record["tokens"])
        for position, word in reversed(list(enumerate(record["words"]))):
            if word is not None:
                tags[word] = targets.names[best[position]]
        spans = [{"type": kind, "start": first, "end": last + 1, "text": " ".join(record["tokens"][first : last + 1])}
                 for kind, first, last in get_entities(tags)]
        found.append({"prediction": tags, "spans": spans})
    return found


def metrics(records: Sequence[Record], targets: Targets, resample: bool) -> Metrics:
    """Entity-level scores by seqeval: lenient (conlleval's) and strict, then each type's; accuracy of words; loss.

    Words beyond `data.max_length` count as tagged O.
    """
    from seqeval import scheme as schemes
    from seqeval.metrics import accuracy_score

    want, got = ([record[side] for record in records] for side in ("reference", "prediction"))
    result: Metrics = {}
    for prefix, scheme in (("", None), ("strict_", vars(schemes)[SCHEMES[targets.problem]])):
        overall = _report(want, got, scheme)["micro avg"]
        counts = _counts(want, got, scheme)
        for name, key, formula in (("f1", "f1-score", scores.micro_f1), ("precision", "precision", scores.precision),
                                   ("recall", "recall", scores.recall)):
            put(result, prefix + name, overall[key], partial(resampled_sums, counts, formula) if resample else None)
    words = np.array([(sum(a == b for a, b in zip(w, g, strict=True)), len(w)) for w, g in zip(want, got, strict=True)])
    put(result, "accuracy", float(accuracy_score(want, got)),
        (lambda: resampled_sums(words, scores.ratio)) if resample else None)
    sums = np.array([(record["loss_sum"], record["num_targets"]) for record in records])
    put(result, "loss", mean_loss(records), (lambda: resampled_sums(sums, scores.ratio)) if resample else None)
    for kind, values in _report(want, got, None).items():
        if not kind.endswith(" avg"):
            result |= {f"f1/{kind}": values["f1-score"], f"precision/{kind}": values["precision"],
                       f"recall/{kind}": values["recall"]}
    return result


def _report(want: list[list[str]], got: list[list[str]], scheme: Any) -> dict[str, dict[str, float]]:
    from seqeval.metrics import classification_report

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tags outside the scheme: the data check names their places
        report: dict[str, dict[str, Any]] = classification_report(
            want, got, output_dict=True, zero_division=0, mode="strict" if scheme else None, scheme=scheme)
    empty = {"micro avg": {"f1-score": 0.0, "precision": 0.0, "recall": 0.0}}
    return {**empty, **{kind: {key: float(value) for key, value in values.items()} for kind, values in report.items()}}


def _counts(want: list[list[str]], got: list[list[str]], scheme: Any) -> np.ndarray:
    """[rows, 3]: entities that are right, predicted, and wanted, so that resampling need not run seqeval again."""
    return np.array([[len(w & g), len(g), len(w)] for w, g in zip(
        *(list(_entities(side, scheme)) for side in (want, got)), strict=True)])


def _entities(rows: list[list[str]], scheme: Any) -> Iterator[set[tuple[Any, ...]]]:
    from seqeval.metrics.sequence_labeling import get_entities
    from seqeval.scheme import Entities

    if scheme is None:
        yield from (set(get_entities(row)) for row in rows)
    else:
        yield from ({entity.to_tuple()[1:] for entity in row} for row in Entities(rows, scheme=scheme).entities)


def metric_names(targets: Targets) -> tuple[str, ...]:
    """Of all types together; each type's own are reported too, but pick no model."""
    return NAMES


def majority(train: Iterable[Record], scored: Sequence[Record], targets: Targets) -> list[Record]:
    """Each word's commonest tag in the training rows, O for words not seen there."""
    seen: dict[str, Counter[str]] = {}
    for record in train:
        for word, tag in zip(record["tokens"], record["reference"], strict=True):
            seen.setdefault(word, Counter())[tag] += 1
    best = {word: max(tags, key=lambda tag: (tags[tag], tag)) for word, tags in seen.items()}
    return [{**record, "prediction": [best.get(word, OUTSIDE) for word in record["tokens"]]} for record in scored]


TOKEN_CLASSIFICATION = Task(
    name="token_classification",
    auto_class=AutoModelForTokenClassification,
    formats=("ner",),
    learn_targets=learn_targets,
    encode=encode,
    encode_prompt=encode_prompt,
    losses=losses,
    predictions=predictions,
    metrics=metrics,
    metric_names=metric_names,
    majority=majority,
    scores_every_row=True,
    surveyed_as="ner",
    scored_by=("seqeval.metrics",),
)
