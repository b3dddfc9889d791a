"""What a device computes at once: the largest micro-batch of a step, of an evaluation, of a generation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from peftune.config.schema import RunConfig
from peftune.data.batches import BatchPlan
from peftune.data.prepare import Prepared
from peftune.data.store import Part
from peftune.loop import evaluate, generate
from peftune.loop.finish import SCORED_SPLITS, TRAIN_PART_ROWS
from peftune.numerics.dealing import packed_groups, padded_groups, rank_groups
from peftune.numerics.losses import IGNORE
from peftune.plan.trace import Rows

LOOKED_AT_STEPS = 256
"""Steps whose micro-batches are looked at; those of longer runs are drawn from the same rows."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The examples of a split to be scored: padded tokens of each, and how many of them are supervised."""

    tokens: Sequence[int]
    supervised: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """The examples of a run: tokens of each, and how many of them are supervised."""

    tokens: Sequence[int]
    supervised: Sequence[int]
    steps: int
    """Of the whole run; 0 where it is not known without the data."""
    order: BatchPlan | None
    """Which examples a step sees; None where all are taken to be as long as the longest."""
    evaluated: Sequence[Scored]
    """Splits that are scored, and the part of the training rows; empty where there are none."""
    padded: Sequence[int] = ()
    """Tokens of each with those that pad the shorter of a pair, where `tokens` has none; else empty."""
    count: Callable[[int], int] | None = None
    """Position of an example -> its supervised tokens, where `supervised` is not their number: pairs count as one."""

    def cut(self, limit: int) -> Lengths:
        """The same examples, truncated to `limit` tokens."""
        def shorter(sizes: Sequence[int]) -> Sequence[int]:
            return [min(size, limit) for size in sizes]

        return replace(
            self, tokens=shorter(self.tokens), supervised=shorter(self.supervised), padded=shorter(self.padded),
            evaluated=[Scored(shorter(split.tokens), shorter(split.supervised)) for split in self.evaluated])

    def targets(self, position: int) -> int:
        """Supervised tokens of an example, or what else there is to predict."""
        return self.supervised[position] if self.count is None else min(self.count(position), self.tokens[position])

    @property
    def longest(self) -> int:
        """Tokens of the longest example to learn from."""
        return max(self.tokens)

    @property
    def mean(self) -> float:
        """Tokens of an example."""
        return sum(self.tokens) / len(self.tokens)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A micro-batch that may be the one that needs most memory."""

    rows: Rows
    tokens: int
    """With padding."""

    @property
    def supervised(self) -> int:
        """Tokens, or examples where those are supervised."""
        return sum(self.rows.supervised)

    @property
    def mask_bytes(self) -> int:
        """Of attention's float32 mask, which padding needs: a number for each two tokens of a row."""
        return 4 * self.tokens * max(self.rows.lengths) if self.tokens > self.rows.tokens else 0


@dataclass(frozen=True, slots=True)
class Work:
    """The largest pieces of work of a rank."""

    candidates: tuple[Candidate, ...]
    """Micro-batches that no other one exceeds in tokens, supervised ones and padding's mask; most tokens first."""
    evaluated: tuple[Rows, ...]
    """Of the batches of an evaluation that with most tokens, and that with most supervised ones."""
    generated: tuple[int, int] | None
    """Rows and tokens, the new ones among them."""


def lengths_without_data(max_length: int, batch_size: int, steps: int, *, scored: bool) -> Lengths:
    """Every example is as long as it may be, and all of it is supervised."""
    sizes = [max_length] * batch_size
    return Lengths(tokens=sizes, supervised=sizes, steps=steps, order=None,
                   evaluated=[Scored(sizes, sizes)] if scored else [])


def packs(config: RunConfig) -> bool:
    """Whether micro-batches are to be packed, if the model can take them."""
    return config.data.layout != "padded" and not config.model.compiles_whole


def lengths_of(config: RunConfig, data: Prepared) -> Lengths:
    """As the run will see them."""
    train = config.train
    split = data.splits["train"]
    tokens = split.lengths if packs(config) else split.padded_lengths
    order = BatchPlan(tokens, split.source, data.weights, train.batch_size, config.seed)
    counted = None if data.targets.kind != "pair" else functools.cache(lambda position: sum(
        int(target != IGNORE) for target in split[position].targets))
    padded = split.padded_lengths.tolist() if counted is not None and packs(config) else ()
    return Lengths(tokens=tokens.tolist(), supervised=np.minimum(split.num_targets, tokens).tolist(), order=order,
                   steps=order.steps(train.num_epochs, train.max_steps),
                   evaluated=_scored(data), padded=padded, count=counted)


def _scored(data: Prepared) -> list[Scored]:
    """As the end of a run scores them: each split, then some of the training rows."""
    splits = [data.splits[name] for name in SCORED_SPLITS if name in data.splits]
    if not splits:
        return []
    train = data.splits["train"]
    part = Part(train, min(TRAIN_PART_ROWS, max(map(len, splits))))
    sizes = [(split.padded_lengths, split.num_targets) for split in splits]
    sizes.append((part.padded_lengths, train.num_targets[part.positions]))
    pairs = data.targets.kind == "pair"  # count as one
    return [Scored(tokens.tolist(), (tokens if pairs else np.minimum(targets, tokens)).tolist())
            for tokens, targets in sizes]


def work_of(
    lengths: Lengths, budget_tokens: int, *, batch_size: int, ranks: int, packed: bool, new_tokens: int
) -> Work:
    """The largest micro-batches that `budget_tokens` gives, and what else a rank computes at once.

    Args:
        lengths: of the examples.
        budget_tokens: `train.tokens_per_micro_batch`.
        batch_size: examples a step.
        ranks: that take examples of their own.
        packed: whether micro-batches are packed.
        new_tokens: generated for each scored example; 0 generates nothing.
    """
    if lengths.padded and not packed:
        lengths = replace(lengths, tokens=lengths.padded)
    grouping = packed_groups if packed else padded_groups
    found: dict[Size, list[int]] = {}
    for positions in _steps(lengths, batch_size):
        for groups in rank_groups([lengths.tokens[i] for i in positions], ranks, budget_tokens, grouping):
            for number, members in enumerate([positions[i] for i in group] for group in groups):
                sizes = [lengths.tokens[i] for i in members]
                tokens = sum(sizes) if packed else len(sizes) * max(sizes, default=0)
                width = max(sizes) if tokens > sum(sizes) else 0
                size = tokens, sum(map(lengths.targets, members)), number > 0, width
                found[size] = max(found.get(size, []), members, key=lambda group: sum(lengths.tokens[i] for i in group))
    candidates = tuple(Candidate(_rows(lengths, found[size], later=size[2]), size[0]) for size in _not_exceeded(found))
    return Work(candidates, _evaluated(lengths), _generated(lengths, new_tokens))


Size = tuple[int, int, bool, int]
"""Of a micro-batch: tokens with padding, supervised ones, whether others come before it in its step, and the length of
its rows if it is padded, so that its attention needs a mask."""


def _not_exceeded(sizes: Collection[Size]) -> list[Size]:
    """Those than which no other one is as large in each respect, the one with the most tokens first."""
    kept: list[Size] = []
    for size in sorted(sizes, reverse=True):
        if not any(all(theirs >= mine for theirs, mine in zip(other, size, strict=True)) for other in kept):
            kept.append(size)
    return kept


def _rows(lengths: Lengths, members: Sequence[int], *, later: bool) -> Rows:
    return Rows(tuple(lengths.tokens[i] for i in members), tuple(map(lengths.targets, members)), later)


def _steps(lengths: Lengths, batch_size: int) -> list[list[int]]:
    if lengths.order is None:
        return [list(range(min(batch_size, len(lengths.tokens))))]
    return [lengths.order.step(step).tolist() for step in range(min(lengths.steps, LOOKED_AT_STEPS))]


def _evaluated(lengths: Lengths) -> tuple[Rows, ...]:
    batches = [Rows(tuple(split.tokens[i] for i in group), tuple(split.supervised[i] for i in group))
               for split in lengths.evaluated for group in padded_groups(split.tokens, evaluate.BUDGET_TOKENS)]
    if not batches:
        return ()
    largest = max(batches, key=lambda rows: len(rows.lengths) * max(rows.lengths))
    return largest, max(batches, key=lambda rows: sum(rows.supervised))


def _generated(lengths: Lengths, new_tokens: int) -> tuple[int, int] | None:
    if not lengths.evaluated or not new_tokens:
        return None
    longest = max(max(split.tokens) for split in lengths.evaluated) + new_tokens
    return min(max(len(split.tokens) for split in lengths.evaluated),
               max(1, generate.BUDGET_TOKENS // longest)), longest
