"""The span of a context that answers a question, or none (SQuAD 1.1 and 2.0)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForQuestionAnswering

from peftune.config.schema import DataConfig, EvaluationConfig
from peftune.data.examples import Batch, Example
from peftune.data.layouts import rows_of
from peftune.data.rows import Row
from peftune.data.targets import RowFault, Targets
from peftune.numerics import scores, squad
from peftune.numerics.intervals import resampled_sums
from peftune.numerics.losses import CANDIDATE, END, IGNORE, START, span_nats
from peftune.tasks.task import Metrics, Record, Task, TextEncoder, mean_loss, put

NULL_POSITION = 0
"""Token that stands for "no answer in this window": the first, [CLS] where the model has one."""

Offsets = list[tuple[int, int] | None]
"""Characters of the context that each token of a window covers; None outside the context."""


def learn_targets(rows: Iterable[Row], config: DataConfig) -> Targets:
    """Whether questions may have no answer, as in SQuAD 2.0."""
    return Targets("answer_or_none" if any(not row.fields["answers"] for row in rows) else "answer")


def encode(row: Row, targets: Targets, text: TextEncoder) -> list[Example]:
    """One question -> its windows over the context, each with its answer's first and last token marked.

    A window without the whole answer marks the null position. Where no window holds the whole answer, the row has no
    target: it would teach that there is none.
    """
    fields = row.fields
    answers = [answer["text"] for answer in fields["answers"]]
    windows = list(_windows(fields["question"], fields["context"], text))
    spans = [_token_span(offsets, fields["answers"][0]) if answers else None for _, _, offsets in windows]
    lost = bool(answers) and not any(spans)
    record = {"id": row.id, "question": fields["question"], "context": fields["context"], "reference": answers,
              "source": f"{row.file}:{row.line}"}
    examples = []
    for number, ((ids, segments, offsets), span) in enumerate(zip(windows, spans, strict=True)):
        marks = [IGNORE if offset is None else CANDIDATE for offset in offsets]
        marks[NULL_POSITION] = CANDIDATE
        if not lost:
            first, last = span or (NULL_POSITION, NULL_POSITION)
            marks[first] += START
            marks[last] += END
        examples.append(Example(ids, marks, int(not lost), len(ids), {**record, "window": number, "offsets": offsets},
                                segments, row.source))
    return examples


def _token_span(offsets: Offsets, answer: Mapping[str, Any]) -> tuple[int, int] | None:
    """Positions of the first and last token that cover an answer; None where the window lacks a part of it."""
    begin, end = answer["start"], answer["start"] + len(answer["text"])
    inside = [(i, offset) for i, offset in enumerate(offsets)
              if offset is not None and offset[0] < end and offset[1] > begin]
    if not inside or inside[0][1][0] > begin or inside[-1][1][1] < end:
        return None
    return inside[0][0], inside[-1][0]


MOST_SHARED = 128
"""Tokens that neighbouring windows share where nobody says how many: those of BERT's own script for SQuAD."""


def _windows(
    question: str, context: str, text: TextEncoder
) -> Iterator[tuple[list[int], list[int] | None, Offsets]]:
    """Ids, token types and context offsets of windows that overlap by `data.doc_stride` tokens."""
    question = question.strip()
    alone = (len(text.tokenizer(question, add_special_tokens=False)["input_ids"])
             + text.tokenizer.num_special_tokens_to_add(pair=True))
    room = text.max_length - alone
    if room < 1:
        raise RowFault(f"the question takes {alone} of {text.max_length} tokens and leaves none for the context",
                       "raise data.max_length, or shorten the question")
    pieces = text.tokenizer(
        question, context, truncation="only_second", max_length=text.max_length, return_offsets_mapping=True,
        stride=min(text.data.doc_stride or min(MOST_SHARED, text.max_length // 3), room - 1),
        return_overflowing_tokens=True)
    types = pieces.get("token_type_ids")
    for number, ids in enumerate(pieces["input_ids"]):
        offsets: Offsets = [
            (begin, end) if sequence == 1 and end > begin else None
            for (begin, end), sequence in zip(pieces["offset_mapping"][number], pieces.sequence_ids(number),
                                              strict=True)]
        yield list(ids), None if types is None else list(types[number]), offsets


def encode_prompt(fields: Mapping[str, Any], text: TextEncoder) -> list[Example]:
    """A record with question and context -> its windows."""
    for key in ("question", "context"):
        if not isinstance(fields.get(key), str) or not fields[key].strip():
            raise RowFault(f"the key {key} is missing or empty", 'write {"question": "...", "context": "..."}, or name '
                           f"its column with --config and data.columns={{{key}: NAME}}")
    shown = {key: fields[key] for key in ("question", "context")}
    return [Example(ids, [], 0, len(ids), {**shown, "window": number, "offsets": offsets}, segments)
            for number, (ids, segments, offsets) in enumerate(_windows(shown["question"], shown["context"], text))]


def losses(logits_BT2: Tensor, batch: Batch, targets: Targets) -> Tensor:
    """[examples] float32: nats of each window's answer span."""
    return span_nats(rows_of(logits_BT2, batch, fill=0.0), rows_of(batch.targets, batch, fill=IGNORE))


def predictions(
    logits_BT2: Tensor, batch: Batch, targets: Targets, records: Sequence[Mapping[str, Any]], *,
    settings: EvaluationConfig,
) -> list[Record]:
    """The best spans of each window as [score, begin, end) in characters of the context, and the null score.

    A span begins and ends inside the context. Its score is the sum of its two logits, as is the null score at the
    null position: sums of logits compare across the windows of a question (Devlin et al., 2019, section 4.3).
    """
    rows = rows_of(logits_BT2, batch, fill=0.0).float()
    return [{"spans": _best_spans(row[: len(record["offsets"])], record["offsets"], settings),
             "null_score": row[NULL_POSITION].sum().item()} for row, record in zip(rows, records, strict=True)]


def _best_spans(logits_T2: Tensor, offsets: Offsets, settings: EvaluationConfig) -> list[tuple[float, int, int]]:
    """Exact: the scores of all spans of at most `max_answer_tokens`, not only of the likeliest starts and ends."""
    inside = [i for i, offset in enumerate(offsets) if offset is not None]
    if not inside:
        return []
    first, after = inside[0], inside[-1] + 1
    start, end = logits_T2[first:after].unbind(-1)
    length = after - first
    allowed = torch.ones(length, length, dtype=torch.bool, device=start.device).triu()
    allowed &= ~torch.ones_like(allowed).triu(settings.max_answer_tokens)
    real = torch.tensor([offsets[i] is not None for i in range(first, after)], device=start.device)
    allowed &= real[:, None] & real[None, :]
    scores_LL = (start[:, None] + end[None, :]).masked_fill(~allowed, -torch.inf)
    values, places = scores_LL.flatten().topk(min(settings.n_best, int(allowed.sum())))
    spans = []
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        begin, last = offsets[first + place // length], offsets[first + place % length]
        assert begin is not None and last is not None
        spans.append((value, begin[0], last[1]))
    return spans


def combine(records: Sequence[Record], targets: Targets, *, settings: EvaluationConfig) -> list[Record]:
    """Windows -> questions: the n best spans over all windows, and the answer, which may be none (an empty text)."""
    questions: list[list[Record]] = []
    for record in records:
        if record["window"] == 0:
            questions.append([])
        questions[-1].append(record)
    may_be_none = targets.problem == "answer_or_none"
    return [_question(position, windows, settings, may_be_none) for position, windows in enumerate(questions)]


def _question(position: int, windows: Sequence[Record], settings: EvaluationConfig, may_be_none: bool) -> Record:
    """One record a question. Its null score is the lowest of its windows': one with an answer is enough."""
    context = windows[0]["context"]
    best: dict[tuple[int, int], float] = {}
    for window in windows:
        for score, begin, end in window["spans"]:
            best[begin, end] = max(score, best.get((begin, end), score))
    ranked = sorted(best.items(), key=lambda item: (-item[1], item[0]))[: settings.n_best]
    n_best = [{"text": context[begin:end], "start": begin, "score": score} for (begin, end), score in ranked]
    null_score = min(window["null_score"] for window in windows)
    kept = {key: value for key, value in windows[0].items()
            if key not in ("spans", "null_score", "window", "offsets", "context", "loss_sum", "num_targets")}
    sums: Record = {key: sum(window[key] for window in windows) for key in ("loss_sum", "num_targets")
                    if key in windows[0]}
    top = n_best[0] if n_best else {"text": "", "start": 0, "score": null_score}
    margin = null_score - top["score"]
    answer: Record = {"prediction": top["text"], "start": top["start"]}
    if may_be_none and margin > settings.no_answer_threshold:
        answer = {"prediction": "", "start": None}
    return {**kept, "position": position, **answer, **sums, "no_answer_margin": margin, "n_best": n_best}


def metrics(records: Sequence[Record], targets: Targets, resample: bool) -> Metrics:
    """Exact match and F1 from 0 to 1; where questions may have no answer, those of either kind too."""
    result: Metrics = {}
    table = np.array([[squad.best_over(score, r["prediction"], r["reference"]) for score in
                       (squad.exact_match, squad.f1)] for r in records])
    answered = np.array([bool(r["reference"]) for r in records])
    for column, name in enumerate(("exact_match", "f1")):
        _mean(result, name, table[:, column], resample)
    if targets.problem == "answer_or_none":
        for column, name in enumerate(("exact_match", "f1")):
            _mean(result, f"answerable_{name}", table[answered, column], resample)
        _mean(result, "unanswerable_accuracy", table[~answered, 0], resample)
    sums = np.array([(r["loss_sum"], r["num_targets"]) for r in records])
    put(result, "loss", mean_loss(records), (lambda: resampled_sums(sums, scores.ratio)) if resample else None)
    return result


def _mean(result: Metrics, name: str, values: np.ndarray, resample: bool) -> None:
    if len(values):
        sums = np.column_stack([values, np.ones_like(values)])
        put(result, name, float(values.mean()), (lambda: resampled_sums(sums, scores.ratio)) if resample else None)


def metric_names(targets: Targets) -> tuple[str, ...]:
    """F1 first."""
    extra = ("answerable_exact_match", "answerable_f1", "unanswerable_accuracy")
    return ("f1", "exact_match", "loss", *(extra if targets.problem == "answer_or_none" else ()))


def question_answering(evaluation: EvaluationConfig) -> Task:
    """The task with the config's number of answers, longest answer and threshold."""
    return Task(
        name="question_answering",
        auto_class=AutoModelForQuestionAnswering,
        formats=("squad",),
        learn_targets=learn_targets,
        encode=encode,
        encode_prompt=encode_prompt,
        losses=losses,
        predictions=partial(predictions, settings=evaluation),
        combine=partial(combine, settings=evaluation),
        metrics=metrics,
        metric_names=metric_names,
        scores_every_row=True,
        surveyed_as="squad",
    )
