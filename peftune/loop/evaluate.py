"""The one evaluation harness: training, `peftune evaluate` and `peftune predict` all come through here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peftune.data.batches import evaluation_batches
from peftune.data.examples import Batch, Example
from peftune.data.layouts import PADDED, Layout, lay_out
from peftune.data.store import Readable
from peftune.data.targets import Targets
from peftune.loop.generate import generate_texts
from peftune.loop.known_states import KnownStates
from peftune.model.reference import Reference
from peftune.numerics.dealing import equal_groups, padded_groups
from peftune.parallel.host_memory import return_free_memory
from peftune.parallel.stop import Stop, StopAgreed
from peftune.parallel.world import World
from peftune.tasks.task import Metrics, Record, Task, with_intervals

BUDGET_TOKENS = 4096
"""Padded tokens of an evaluation batch. Fixed, so that scores do not depend on the training's memory knob."""


@dataclass(frozen=True, slots=True)
class Evaluator:
    """What it takes to score any model of a task on any split."""

    task: Task
    targets: Targets
    tokenizer: PreTrainedTokenizerBase
    world: World
    autocast: Callable[[], AbstractContextManager[None]]
    max_new_tokens: int
    reference: Reference | None = None
    """The untrained model, for tasks that compare with it."""
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    lockstep: bool = False
    """Forward passes are joint: ranks with less to do take part in the others' with nothing of their own."""
    stop: Stop = field(default_factory=Stop)
    layout: Layout = PADDED
    """Another one where rows are divided. Generation does not divide them."""
    known: KnownStates = field(default_factory=KnownStates)
    """Batches of splits that it knows start behind the frozen layers."""
    warn: Callable[[str], None] = lambda text: None

    def batch(self, examples: Sequence[Example], positions: Sequence[int]) -> Batch:
        """Examples of a split as an evaluation lays them out."""
        return lay_out(examples, positions, layout=self.layout, pad_id=self.tokenizer.pad_token_id,
                       kind=self.targets.kind, width=self.targets.width, device=self.world.device)

    def batches(self, split: Readable, *, rank: int, ranks: int) -> list[list[int]]:
        """Positions of the rows of each batch that one of so many ranks scores."""
        return evaluation_batches(split.padded_lengths.tolist(), rank=rank, ranks=ranks, budget_tokens=BUDGET_TOKENS,
                                  grouping=equal_groups if self.layout.equal_lengths else padded_groups)

    def agree(self) -> None:
        """Before each batch. Raises StopAgreed on all ranks if one of them has been asked to stop."""
        if self.world.any(self.stop.asked()):
            raise StopAgreed


@dataclass(frozen=True, slots=True)
class Scored:
    """Metrics of a split and the records they were computed from, in order of position."""

    metrics: Metrics
    records: list[Record]


def evaluate(
    evaluator: Evaluator, model: nn.Module, split: Readable, *, name: str, intervals: bool = False,
    generate: bool = False,
) -> Scored:
    """Score a model on a split, each example once.

    Every rank makes the records of its batches; they are gathered by position, and the metrics are computed
    from the records alone: so neither the number of ranks nor the batches can change them.

    Args:
        evaluator: task, tokenizer, processes, precision.
        model: unwrapped; left in the mode it came in.
        split: tokenised examples.
        name: of the split, for the progress display.
        intervals: also bootstrap intervals.
        generate: also generated text and its metrics, where the task has them.

    Raises:
        StopAgreed: a rank was asked to stop; heard by all within a batch.
    """
    records = predict(evaluator, model, split, name=name, generate=generate)
    metrics = evaluator.world.on_main(
        lambda: with_intervals(evaluator.task.metrics(records, evaluator.targets, intervals)))
    return Scored(metrics, records)


def predict(
    evaluator: Evaluator, model: nn.Module, split: Readable, *, name: str, generate: bool, scored: bool = True
) -> list[Record]:
    """One record a row, in order of position, on every rank. `scored`: the examples have targets."""
    evaluator.world.progress.at(f"scoring {name}", steady=True)
    was_training = model.training
    model.eval()
    return_free_memory(evaluator.world.device.type)
    with torch.no_grad():
        mine = _forward_records(evaluator, model, split, name, scored)
        if generate and evaluator.task.generates:
            _add_given(evaluator, split, mine)
            if evaluator.max_new_tokens > 0:
                _add_generations(evaluator, model, split, mine, name)
    model.train(was_training)
    return_free_memory(evaluator.world.device.type)
    records = sorted(evaluator.world.gather(mine), key=lambda record: record["position"])
    assert [record["position"] for record in records] == list(range(len(split)))
    return evaluator.task.combine(records, evaluator.targets)


def _forward_records(
    evaluator: Evaluator, model: nn.Module, split: Readable, name: str, scored: bool
) -> list[Record]:
    world, task = evaluator.world, evaluator.task
    hand, hands = evaluator.layout.hand(world.rank, world.ranks)
    division = evaluator.layout.division
    batches = evaluator.batches(split, rank=hand, ranks=hands)
    batches += [[]] * (world.largest(len(batches)) - len(batches))
    records: list[Record] = []
    for number, positions in enumerate(batches, start=1):
        evaluator.agree()
        if not positions and not evaluator.lockstep:
            continue
        examples = [split[i] for i in positions]
        if task.generates and not scored:
            records += [_record(i, example) for i, example in zip(positions, examples, strict=True)]
            continue
        batch = evaluator.batch(examples, positions)
        with evaluator.autocast(), evaluator.known.of(split, batch):
            outputs = task.forward(model, batch, evaluator.reference)
        if not positions:
            continue
        predictions = task.predictions(outputs, batch, evaluator.targets, [example.record for example in examples])
        sums = _loss_sums(evaluator, outputs, batch) if scored else [0.0] * len(positions)
        for i, example, prediction, loss_sum in zip(positions, examples, predictions, sums, strict=True):
            outcome = {"loss_sum": loss_sum, "num_targets": example.num_targets} if scored else {}
            records.append({**_record(i, example), **prediction, **outcome})
        evaluator.progress(name, number, len(batches))
    # ranks that have shared the rows know the same of them: each keeps some, and generates from those
    return records if division is None else records[division.place :: division.ranks]


def _loss_sums(evaluator: Evaluator, outputs: Tensor, batch: Batch) -> list[float]:
    """Each example's loss, over all ranks that share it."""
    sums, division = evaluator.task.losses(outputs, batch, evaluator.targets), evaluator.layout.division
    return (sums if division is None else division.sum(sums)).tolist()


def _record(position: int, example: Example) -> Record:
    return {"position": position, **example.record}


def _add_given(evaluator: Evaluator, split: Readable, records: Sequence[Record]) -> None:
    """For people who read the records: the prompt as the model is given it, marks included; else the whole text."""
    for record in records:
        length = record.get("prompt_length")
        text = evaluator.tokenizer.decode(split[record["position"]].input_ids[:length or None])
        record["prompt" if length else "text"] = text


def _add_generations(
    evaluator: Evaluator, model: nn.Module, split: Readable, records: Sequence[Record], name: str
) -> None:
    """Continue each prompt that has an answer to compare with; the text goes into the record."""
    by_position = {record["position"]: record for record in records}
    prompts = {i: split[i].input_ids[: record["prompt_length"]]
               for i, record in by_position.items() if record.get("prompt_length")}
    texts = generate_texts(
        model, evaluator.tokenizer, prompts, max_new_tokens=evaluator.max_new_tokens, device=evaluator.world.device,
        autocast=evaluator.autocast, progress=lambda done, total: evaluator.progress(f"{name}: generate", done, total),
        calls=evaluator.world.largest, joint=evaluator.lockstep, before=evaluator.agree,
        token=evaluator.world.progress.tick, warn=evaluator.warn, equal_lengths=evaluator.layout.equal_lengths)
    for i, text in texts.items():
        by_position[i]["prediction"] = text
