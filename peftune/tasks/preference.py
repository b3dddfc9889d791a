"""Which of two answers is better: direct preference optimisation against the untrained model.

Source: Rafailov et al., 2023, arXiv:2305.18290.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peftune.config.schema import DataConfig, TrainConfig
from peftune.data.examples import Batch, Example
from peftune.data.preferences import preference_fields
from peftune.data.rows import Row
from peftune.data.targets import Targets
from peftune.data.turns import read_alone
from peftune.model.next_token import nats_by_sequence
from peftune.model.reference import Reference
from peftune.numerics import scores
from peftune.numerics.intervals import resampled_sums
from peftune.numerics.losses import IGNORE, preference_margins, preference_nats
from peftune.tasks.supervision import supervised_tokens
from peftune.tasks.task import Metrics, Record, Task, TextEncoder, mean_loss, put, rounded

NAMES = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")


def learn_targets(rows: Iterable[Row], config: DataConfig) -> Targets:
    """Pairs have no classes."""
    return Targets("preference", kind="pair")


def encode(row: Row, targets: Targets, text: TextEncoder) -> list[Example]:
    """One row -> the prompt with the chosen and the prompt with the rejected answer, laid end to end.

    Targets are the tokens of the two answers, end marks included. A pair counts as one target.
    """
    sides = [_side(row.fields, answer, text) for answer in ("chosen", "rejected")]
    cut = [(ids[: text.max_length], targets[: text.max_length]) for ids, targets in sides]
    learned = all(any(target != IGNORE for target in targets[1:]) for _, targets in cut)
    record = {"id": row.id, "reference": "chosen", "source": f"{row.file}:{row.line}",
              "prompt": row.fields["prompt"] if "prompt" in row.fields else _shown(row.fields["messages"]),
              **{answer: said if isinstance(said := row.fields[answer], str) else _shown(said)
                 for answer in ("chosen", "rejected")}}
    return [Example(
        [*cut[0][0], *cut[1][0]], [*cut[0][1], *cut[1][1]], int(learned), max(len(ids) for ids, _ in sides), record,
        source=row.source, first_part=len(cut[0][0]))]


def _shown(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def _side(fields: Mapping[str, Any], answer: str, text: TextEncoder) -> tuple[list[int], list[int]]:
    said = fields[answer]
    if "prompt" in fields:
        whole = {"prompt": fields["prompt"], "completion": said}
    else:
        turns = [{"role": "assistant", "content": said}] if isinstance(said, str) else said
        whole = {"messages": [*read_alone(fields["messages"]), *turns], "tools": fields.get("tools")}
    ids, supervised = supervised_tokens(whole, text)
    return ids, [token if on else IGNORE for token, on in zip(ids, supervised, strict=True)]


def encode_prompt(fields: Mapping[str, Any], text: TextEncoder) -> list[Example]:
    """A record with both answers, to be compared."""
    (example,) = encode(Row(preference_fields(fields), "", 0, ""), Targets("preference", kind="pair"), text)
    return [replace(example, record={key: said for key, said in example.record.items() if key != "source"})]


def forward(model: nn.Module, batch: Batch, reference: Reference | None) -> Tensor:
    """[examples, 4] float32: nats, as log-probabilities, of chosen and rejected under the model, then the reference.

    The reference comes first, so that the model's own activations are not held meanwhile.
    """
    assert reference is not None, "build gives a reference to tasks that need one"
    fixed = reference(partial(_log_probabilities, batch))
    return torch.cat([_log_probabilities(batch, model), fixed], dim=-1)


def _log_probabilities(batch: Batch, model: nn.Module) -> Tensor:
    return -nats_by_sequence(model, batch.inputs, batch.predicted(), len(batch.lengths)).view(-1, 2)


def losses(log_probabilities_B4: Tensor, batch: Batch, targets: Targets, *, beta: float) -> Tensor:
    """[examples] float32; 0 for the pair that stands in where there is none."""
    nats = preference_nats(log_probabilities_B4, beta)
    return nats if batch.positions else nats * 0


def predictions(
    log_probabilities_B4: Tensor, batch: Batch, targets: Targets, records: Sequence[Mapping[str, Any]], *, beta: float
) -> list[Record]:
    """Rewards beta (log p - log p_ref) of both answers, their difference, and which one the model now prefers."""
    margins = (beta * preference_margins(log_probabilities_B4)).tolist()
    return [
        {"prediction": "chosen" if margin > 0 else "rejected", "margin": margin,
         "chosen_reward": beta * (chosen - chosen_reference), "rejected_reward": beta * (rejected - rejected_reference),
         "chosen_log_probability": chosen, "rejected_log_probability": rejected}
        for margin, (chosen, rejected, chosen_reference, rejected_reference)
        in zip(margins, log_probabilities_B4.tolist(), strict=True)
    ]


def metrics(records: Sequence[Record], targets: Targets, resample: bool) -> Metrics:
    """Mean loss, share of pairs whose chosen answer has gained more than the rejected one, mean margin and rewards.

    A pair whose answers have gained the same, as all have before training, counts one half: as a coin would.
    """
    columns: list[tuple[str, float, list[float]]] = [("loss", mean_loss(records), [r["loss_sum"] for r in records])]
    right = [float(np.heaviside(r["margin"], 0.5)) for r in records]
    columns.append(("accuracy", float(np.mean(right)), right))
    for name in NAMES[2:]:
        values = [r[name] for r in records]
        columns.append((name, rounded(float(np.mean(values))), values))
    result: Metrics = {}
    for name, value, values in columns:
        put(result, name, value, _resampled(values) if resample else None)
    return result


def _resampled(values: Sequence[float]) -> Callable[[], np.ndarray]:
    table = np.column_stack([values, np.ones(len(values))])
    return lambda: resampled_sums(table, scores.ratio)


def metric_names(targets: Targets) -> tuple[str, ...]:
    """`loss` first: accuracy is coarse on few pairs."""
    return NAMES


def preference(train: TrainConfig) -> Task:
    """The task with the config's beta."""
    return Task(
        name="preference",
        auto_class=AutoModelForCausalLM,
        formats=("preference",),
        learn_targets=learn_targets,
        encode=encode,
        encode_prompt=encode_prompt,
        forward=forward,
        losses=partial(losses, beta=train.dpo_beta),
        predictions=partial(predictions, beta=train.dpo_beta),
        metrics=metrics,
        metric_names=metric_names,
        converses=True,
        new_head=False,
        next_token=True,
        needs_reference=True,
        surveyed_as="preference",
    )
