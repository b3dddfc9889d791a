"""The next token: plain text, prompts with completions, conversations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peftune.config.schema import DataConfig
from peftune.data.examples import Batch, Example
from peftune.data.rows import Row
from peftune.data.targets import Targets
from peftune.model.next_token import nats_by_sequence
from peftune.model.reference import Reference
from peftune.numerics import scores
from peftune.numerics.intervals import resampled_sums
from peftune.numerics.losses import IGNORE
from peftune.tasks import generated
from peftune.tasks.supervision import doubt, prompt_tokens, supervised_tokens
from peftune.tasks.task import Metrics, Record, Task, TextEncoder, mean_loss, put, rounded

NEXT_TOKEN = Targets("next_token")


def learn_targets(rows: Iterable[Row], config: DataConfig) -> Targets:
    """Next-token targets have no classes."""
    return NEXT_TOKEN


def encode(row: Row, targets: Targets, text: TextEncoder) -> list[Example]:
    """One row -> ids and, for each, itself as a target or IGNORE.

    Plain text that is too long goes on in further examples where `data.too_long` is split: each begins with the
    last token of the one before it, so that every token is predicted exactly once.
    """
    ids, supervised = supervised_tokens(row.fields, text, last_only=text.data.train_on == "last_turn")
    prompted = "messages" in row.fields or bool(row.fields.get("prompt"))
    prompt_length, reference = _last_answer(ids, supervised, text) if prompted else (0, None)
    if text.data.train_on == "all":
        supervised = [True] * len(ids)
    record = {"id": row.id, "reference": reference, "source": f"{row.file}:{row.line}",
              "prompt_length": prompt_length if reference else 0}
    if text.data.too_long != "split" or "text" not in row.fields:
        cut = slice(0, text.max_length)
        return [_example(ids[cut], supervised[cut], len(ids), record, row.source)]
    pieces = list(_pieces(len(ids), text.max_length))
    return [_example(ids[piece], supervised[piece], piece.stop - piece.start,
                     record if len(pieces) == 1 else {**record, "id": f"{row.id}/{number}"}, row.source)
            for number, piece in enumerate(pieces)]


def _example(
    ids: Sequence[int], supervised: Sequence[bool], full_length: int, record: Mapping[str, Any], source: int
) -> Example:
    labels = [token if on else IGNORE for token, on in zip(ids, supervised, strict=True)]
    # position 0 has no earlier token to be predicted from
    return Example(ids, labels, sum(supervised[1:]), full_length, record, source=source)


def _pieces(length: int, longest: int) -> Iterator[slice]:
    begin = 0
    while begin == 0 or begin + 1 < length:
        yield slice(begin, min(begin + longest, length))
        begin += max(1, longest - 1)


def _last_answer(ids: Sequence[int], supervised: Sequence[bool], text: TextEncoder) -> tuple[int, str | None]:
    """Tokens before the last supervised run, and the text of that run; no text where nothing comes before it."""
    end = max((i for i, on in enumerate(supervised) if on), default=-1) + 1
    begin = end
    while begin > 0 and supervised[begin - 1]:
        begin -= 1
    if begin == 0 or begin >= text.max_length:
        return 0, None
    return begin, text.tokenizer.decode(ids[begin:end], skip_special_tokens=True).strip()


def encode_prompt(fields: Mapping[str, Any], text: TextEncoder) -> list[Example]:
    """A record without its answer -> the ids that generation continues."""
    return [prompt_tokens(fields, text)]


def forward(model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
    """[examples] float32: nats of each example, summed over its supervised tokens."""
    return nats_by_sequence(model, batch.inputs, batch.predicted(), len(batch.lengths))


def losses(nats: Tensor, batch: Batch, targets: Targets) -> Tensor:
    """[examples] float32: what the model's forward pass gave."""
    return nats


def predictions(
    nats: Tensor, batch: Batch, targets: Targets, records: Sequence[Mapping[str, Any]]
) -> list[Record]:
    """Nothing is read off the logits: text is generated."""
    return [{} for _ in records]


def metrics(records: Sequence[Record], targets: Targets, resample: bool) -> Metrics:
    """Loss in nats a token and perplexity; scores of generated text where there is some, and how many rows have none.
    """
    result: Metrics = {}
    loss = mean_loss(records)
    sums_N2 = np.array([(record["loss_sum"], record["num_targets"]) for record in records])
    losses = [rounded(value) for value in resampled_sums(sums_N2, scores.ratio)] if resample else []
    put(result, "loss", loss, (lambda: np.array(losses)) if resample else None)
    put(result, "perplexity", _exp(loss), (lambda: np.array([_exp(nats) for nats in losses])) if resample else None)
    answered = [r for r in records if r.get("prediction") is not None and r.get("reference") is not None]
    if answered:
        for name, value, resampled in generated.generation_scores(
                [r["prediction"] for r in answered], [r["reference"] for r in answered]):
            put(result, name, value, resampled if resample else None)
        if len(answered) < len(records):
            result["not_generated"] = len(records) - len(answered)
    return result


def _exp(nats: float) -> float:
    return rounded(math.exp(nats)) if nats < 700 else math.inf


def metric_names(targets: Targets) -> tuple[str, ...]:
    """All of them, whether text is generated or not."""
    return ("loss", "perplexity", *generated.NAMES)


CAUSAL_LM = Task(
    name="causal_lm",
    auto_class=AutoModelForCausalLM,
    formats=("messages", "sharegpt", "alpaca", "prompt_completion", "text"),
    learn_targets=learn_targets,
    encode=encode,
    encode_prompt=encode_prompt,
    forward=forward,
    losses=losses,
    predictions=predictions,
    metrics=metrics,
    metric_names=metric_names,
    doubt=doubt,
    generates=True,
    next_token=True,
    converses=True,
    new_head=False,
    surveyed_as="generation",
)
