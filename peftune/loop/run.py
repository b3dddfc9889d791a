"""A run as the loop sees it: objects, no names. `build.py` makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from peftune.data.batches import BatchPlan
from peftune.data.examples import Batch
from peftune.data.layouts import Layout, lay_out
from peftune.data.prepare import Prepared
from peftune.loop.evaluate import Evaluator
from peftune.loop.saver import Saver
from peftune.loop.step import StepWork
from peftune.observe.journal import Journal
from peftune.parallel.stop import Stop
from peftune.parallel.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Every:
    """A period in steps; the last step of the run is never due, since the run's end does the same and more."""

    steps: int

    def due(self, step: int, last: int) -> bool:
        """Whether it is time after `step` steps of `last`."""
        return step % self.steps == 0 and step < last


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that `fit` and `finish` use."""

    folder: Path
    model: nn.Module
    """As the strategy prepared it."""
    strategy: Strategy
    optimizer: Optimizer
    learning_rate: Callable[[int], float]
    """Step index, from 0 -> rate."""
    losses: Callable[[nn.Module, Batch], Tensor]
    autocast: Callable[[], AbstractContextManager[None]]
    data: Prepared
    plan: BatchPlan
    layout: Layout
    evaluator: Evaluator
    journal: Journal
    publish: Callable[[nn.Module, dict[str, Tensor], Path], None]
    """Write a model, unwrapped, with its gathered weights, as a plain peft or transformers folder."""
    live_logits: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    """Logits of the live model, unwrapped, [.., ..] float32; all ranks call it."""
    reload_deviation: Callable[[nn.Module, Path, dict[str, Tensor], Tensor], float]
    """Largest difference between the live model's logits and those of what a published folder loads to."""
    reload_tolerance: float
    """For that difference, see `finish.reload_tolerance`."""
    published_weights: Callable[[nn.Module, Path], dict[str, Tensor]]
    """The trained weights of a published folder, by the live model's names."""
    steps: int
    micro_batch_tokens: int
    max_grad_norm: float | None
    max_skipped_steps: int
    """In a row; one more ends the run."""
    metric: str
    patience: int | None
    generate_every_time: bool
    """Whether the metric that picks `best` needs generated text at each evaluation."""
    log: Every
    evaluation: Every
    checkpoint: Every
    saver: Saver
    set_back: Callable[[str], bool]
    """Whether the adapter's method may undo a step of the weight of that name."""
    stop: Stop
    facts: dict[str, Any]
    """What the summary repeats: task, parameters, strategy, world size."""

    def work(self, step: int) -> StepWork:
        """This rank's part of step `step`, and the totals of all ranks, which the plan gives without asking them."""
        world, split = self.strategy.world, self.data.splits["train"]
        world.progress.at(f"in step {step + 1}", steady=True)
        world.progress.warm = True
        hand, hands = self.layout.hand(world.rank, world.ranks)
        groups = self.plan.micro_batches(step, rank=hand, ranks=hands,
                                         budget_tokens=self.micro_batch_tokens, grouping=self.layout.grouping)
        positions = self.plan.step(step)
        return StepWork(
            micro_batches=self._batches(groups), micro_batch_count=len(groups), examples=len(positions),
            tokens=int(split.lengths[positions].sum()), targets=int(split.num_targets[positions].sum()),
            ids=lambda: [str(split[int(i)].record["source"]) for i in positions],
        )

    def _batches(self, groups: list[list[int]]) -> Iterator[Batch]:
        split, targets = self.data.splits["train"], self.data.targets
        for positions in groups:
            batch = lay_out([split[i] for i in positions], positions, layout=self.layout, kind=targets.kind,
                            pad_id=self.evaluator.tokenizer.pad_token_id, width=targets.width,
                            device=self.strategy.world.device)
            self.strategy.world.progress.step()
            yield batch

    @property
    def epochs_of(self) -> Callable[[int], float]:
        """Steps done -> epochs done."""
        return lambda step: step / self.plan.steps_per_epoch
