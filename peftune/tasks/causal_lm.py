"""The next token: plain text, prompts with completions, conversations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from rouge_score import rouge_scorer
from torch import Tensor
from transformers import AutoModelForCausalLM

from peftune.config.schema import DataConfig
from peftune.data.chat import Span, TemplateMismatch, assistant_spans, render
from peftune.data.examples import Batch, Example
from peftune.data.formats import PROMPT_COLUMNS, prompt_messages
from peftune.data.prepare import RowFault, Targets
from peftune.data.rows import Row
from peftune.numerics import scores
from peftune.numerics.intervals import bootstrap_of_sums
from peftune.numerics.losses import IGNORE, next_token_nats
from peftune.tasks.task import Metrics, Record, Task, TextEncoder, mean_loss, put, rounded

NEXT_TOKEN = Targets("next_token")


def learn_targets(rows: Sequence[Row], config: DataConfig) -> Targets:
    """Next-token targets have no classes."""
    return NEXT_TOKEN


def encode(row: Row, targets: Targets, text: TextEncoder) -> Example:
    """One row -> ids and, for each, itself as a target or IGNORE.

    Targets are the completion, the assistant turns with their end marks, or all tokens of plain text.
    The end-of-text token always closes the last target and is a target, also where it doubles as padding.
    """
    fields = row.fields
    try:
        whole, spans, own_specials = _supervised_text(fields, text)
    except TemplateMismatch as error:
        raise RowFault(str(error), "mend the row, or set data.chat_template") from None
    ids, supervised = _tokenise(whole, spans, own_specials, text)
    full_length = len(ids)
    prompt_length, reference = _last_answer(ids, supervised, text)
    if text.supervise_all:
        supervised = [True] * len(ids)
    ids, supervised = ids[: text.max_length], supervised[: text.max_length]
    labels = [token if on else IGNORE for token, on in zip(ids, supervised, strict=True)]
    record = {"id": row.id, "reference": reference, "source": f"{row.file}:{row.line}",
              "prompt_length": prompt_length if reference else 0}
    # position 0 has no earlier token to be predicted from
    return Example(ids, labels, sum(supervised[1:]), full_length, record, source=row.source)


def _supervised_text(fields: Mapping[str, Any], text: TextEncoder) -> tuple[str, list[Span], bool]:
    """Text, character spans of it to learn, and whether the text holds its special tokens already."""
    if "messages" in fields:
        whole, spans = assistant_spans(text.tokenizer, fields["messages"], fields.get("tools"))
        return whole, spans, True
    if "prompt" in fields:
        prompt, completion = fields["prompt"], fields["completion"]
        return prompt + completion, [(len(prompt), len(prompt) + len(completion))], False
    return fields["text"], [(0, len(fields["text"]))], False


def _tokenise(
    whole: str, spans: Sequence[Span], own_specials: bool, text: TextEncoder
) -> tuple[list[int], list[bool]]:
    """Ids of the whole text and which of them are targets.

    The text is tokenised once, as it will be read, and each token that reaches into a span is a target.
    Within a span nothing after its first end-of-text token is one: what follows is the template's, not
    the model's to write.
    """
    eos = text.tokenizer.eos_token_id
    encoding = text.tokenizer(whole, add_special_tokens=not own_specials, return_offsets_mapping=True)
    ids = list(encoding["input_ids"])
    supervised = [False] * len(ids)
    for begin, end in spans:
        ended = False
        for position, (first, after) in enumerate(encoding["offset_mapping"]):
            if after > begin and first < end and after > first and not ended:
                supervised[position] = True
                ended = ids[position] == eos
    end = max((i for i, on in enumerate(supervised) if on), default=-1) + 1
    if end == 0:
        return ids, supervised
    ids, supervised = ids[:end], supervised[:end]  # nothing is learned from what follows the last target
    if ids[-1] != eos:
        ids, supervised = [*ids, eos], [*supervised, True]
    return ids, supervised


def _last_answer(ids: Sequence[int], supervised: Sequence[bool], text: TextEncoder) -> tuple[int, str | None]:
    """Tokens before the last supervised run, and the text of that run; no text where nothing comes before it."""
    end = max((i for i, on in enumerate(supervised) if on), default=-1) + 1
    begin = end
    while begin > 0 and supervised[begin - 1]:
        begin -= 1
    if all(supervised[1:]) or begin == 0 or begin >= text.max_length:
        return 0, None
    return begin, text.tokenizer.decode(ids[begin:end], skip_special_tokens=True).strip()


def encode_prompt(fields: Mapping[str, Any], text: TextEncoder) -> Example:
    """A prompt, a conversation or an instruction -> the ids that generation continues; its end is kept when cut."""
    try:
        if "prompt" in fields or "text" in fields:
            prompt = fields.get("prompt", fields.get("text"))
            if not isinstance(prompt, str) or not prompt:
                raise RowFault("prompt is missing or empty", 'write {"prompt": "..."}')
            encoding = text.tokenizer(prompt)["input_ids"]
            ids = encoding[:-1] if encoding and encoding[-1] == text.tokenizer.eos_token_id else encoding
        else:
            messages = prompt_messages(fields)
            if messages is None:
                raise RowFault(f"none of {', '.join(PROMPT_COLUMNS)} is there", 'write {"prompt": "..."}')
            whole = render(text.tokenizer, messages, fields.get("tools"), generation_prompt=True)
            ids = text.tokenizer(whole, add_special_tokens=False)["input_ids"]
    except TemplateMismatch as error:
        raise RowFault(str(error), "mend the row") from None
    return Example(ids[-text.max_length:], [], 0, len(ids), {"prompt_length": min(len(ids), text.max_length)})


def losses(logits_BTV: Tensor, batch: Batch, targets: Targets) -> Tensor:
    """[B] float32: nats of each example, summed over its supervised tokens.

    Prompt-learning methods put logits of their virtual tokens before those of the text.
    """
    return next_token_nats(logits_BTV[:, -batch.targets.shape[1]:], batch.targets)


def metrics(records: Sequence[Record], targets: Targets, intervals: bool) -> Metrics:
    """Loss in nats a token and perplexity; exact match and ROUGE-L (F) where text was generated."""
    result: Metrics = {}
    loss = mean_loss(records)
    sums_N2 = np.array([(record["loss_sum"], record["num_targets"]) for record in records])
    low, high = map(rounded, bootstrap_of_sums(sums_N2, scores.ratio)) if intervals else (loss, loss)
    put(result, "loss", loss, (lambda: (low, high)) if intervals else None)
    put(result, "perplexity", _exp(loss), (lambda: (_exp(low), _exp(high))) if intervals else None)
    answered = [r for r in records if r.get("prediction") is not None and r.get("reference") is not None]
    if answered:
        scorer = rouge_scorer.RougeScorer(["rougeL"])
        for name, values in (
            ("exact_match", [float(r["prediction"].strip() == r["reference"]) for r in answered]),
            ("rouge_l", [scorer.score(r["reference"], r["prediction"])["rougeL"].fmeasure for r in answered]),
        ):
            put(result, name, float(np.mean(values)), partial(_mean_interval, values) if intervals else None)
    return result


def _mean_interval(values: Sequence[float]) -> tuple[float, float]:
    return bootstrap_of_sums(np.column_stack([values, np.ones(len(values))]), scores.ratio)


def _exp(nats: float) -> float:
    return rounded(math.exp(nats)) if nats < 700 else math.inf


CAUSAL_LM = Task(
    name="causal_lm",
    auto_class=AutoModelForCausalLM,
    formats=("messages", "sharegpt", "alpaca", "prompt_completion", "text"),
    learn_targets=learn_targets,
    encode=encode,
    encode_prompt=encode_prompt,
    losses=losses,
    predictions=lambda logits_BTV, targets: [{} for _ in range(logits_BTV.shape[0])],
    metrics=metrics,
    metric_names=lambda targets: ("loss", "perplexity", "exact_match", "rouge_l"),
    generates=True,
)
