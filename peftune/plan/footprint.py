"""Peak memory of one rank at each instant that can be the highest, by cause."""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from peftune.config.schema import RunConfig
from peftune.model.assemble import Parameters
from peftune.plan.devices import Device
from peftune.plan.divide import Division, divided
from peftune.plan.layers import Bytes, adapts_all_alike, on_the_line, traced_layers
from peftune.plan.live import START
from peftune.plan.models import Models, Road, Subject
from peftune.plan.trace import Rows, TracedStep, lies_end_to_end, trace_evaluation, trace_generation, trace_step
from peftune.plan.work import Candidate, Work

CAUSES = ("weights", "adapters", "gradients", "optimizer", "activations", "logits_and_loss", "temporaries",
          "exchange_buffers", "allocator_slack", "framework", "other")
"""weights: with quantisation state. activations: kept for backward, and made on the way. logits_and_loss: of the output
layer, and their gradients. temporaries: of backward and the optimizer. What attention needs is among the activations:
SDPA keeps one number a row and head beside its inputs and outputs. framework: what a GPU's libraries take."""
MASKS_MATTER = 0.01
"""Of a step's peak: smaller differences of masks are left out."""
UNTRACED: Mapping[str, set[str]] = {
    "model": {"gradient_checkpointing"},
    "train": {"tokens_per_micro_batch", "batch_size", "num_epochs", "max_steps", "learning_rate"},
}
"""Settings that change no trace of a given micro-batch on a given road."""
STATES = ("weights", "adapters", "optimizer")
MOVING = ("gradients", "activations", "logits_and_loss", "temporaries", "exchange_buffers")
"""Causes that come and go within a step."""


@dataclass(frozen=True, slots=True)
class Line:
    """What two traces say of the whole model, as one process has it; see `Tracer`."""

    step: Mapping[str, Bytes]
    others: Mapping[str, Bytes]
    """evaluation and generation, where there are any."""
    flops: float
    parameters: Parameters
    tokens: int
    """Of the largest micro-batch, without padding."""
    layers: int
    outside: float
    """Bytes of weights that lie in no layer."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a rank holds at most."""

    instants: Mapping[str, Bytes]
    """load, step, evaluation, generation, save, resume -> bytes by cause; in order of a run."""
    flops: float
    """Of the largest micro-batch, forward and backward."""
    tokens: int
    """Of that micro-batch, without padding."""
    parameters: Parameters

    @property
    def peak_instant(self) -> str:
        """When the peak is."""
        return max(self.instants, key=lambda name: sum(self.instants[name].values()))

    @property
    def peak_bytes(self) -> int:
        """How high it is."""
        return round(sum(self.instants[self.peak_instant].values()))


class Tracer:
    """Traces a model with few layers twice: its own number of layers lies on the line through both.

    Remembers what it has traced, in this process: strategies and devices need no further trace, nor does another run of
    the same shape.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject, self._models = subject, Models(subject)
        self._counts = traced_layers(subject.model_config, alike=adapts_all_alike(subject.config.adapter))
        self.layers: int = subject.model_config.get_text_config().num_hidden_layers
        few, many = self._counts[0], self._counts[-1]
        self._share = (self.layers - few) / (many - few) if many > few else 0.0
        self._known = _traces_of(repr((
            subject.source, subject.model_config.to_json_string(use_diff=False), subject.targets, subject.rows,
            subject.config.model_dump_json(include={"task", "model", "adapter", "train"}, exclude=UNTRACED))))

    def under(self, config: RunConfig) -> Tracer:
        """The same traces, for a config that differs in `UNTRACED` settings alone."""
        other = copy.copy(self)
        other.subject = replace(self.subject, config=config)
        return other

    def packs(self, road: Road) -> bool:
        """Whether micro-batches lie end to end: they are to, and the model's attention and adapter can be told where
        examples end. Whether it keeps them apart is proven by a run alone."""
        return road.packed and all(self._traced(
            "layout", lambda count: lies_end_to_end(self._models, count, road), road.by_module, road.few_sizes))

    def states_bytes(self, division: Division) -> float:
        """What a rank's weights take, without a trace: no plan is smaller."""
        held = on_the_line(*self._states(), self._share)
        return sum(divided(held, held, self.layers, division, outside=0.0, computing=False, training=False).values())

    def _states(self) -> tuple[Bytes, Bytes]:
        def held_by(count: int) -> Bytes:
            return self._models.opened(count).live.held()

        first, second = self._traced("states", held_by)
        return first, second

    def _outside(self) -> float:
        """Bytes of weights that lie in no layer; of a model too small to tell them apart, none."""
        few, many = self._counts[0], self._counts[-1]
        first, second = (sum(held.values()) for held in self._states())
        return first - few * (second - first) / (many - few) if many > few else 0.0

    def line(self, work: Work, road: Road) -> Line:
        """What a rank's largest pieces of work take."""
        highest = self._highest(work.candidates, road)
        others: dict[str, Bytes] = {}
        if work.evaluated:
            others["evaluation"] = max((self._evaluation(rows, road) for rows in work.evaluated), key=_together)
        if (generated := work.generated) is not None:
            others["generation"] = on_the_line(*self._traced(
                "generation", lambda count: trace_generation(self._models, count, *generated), generated), self._share)
        longest = work.candidates[0].rows
        timed = self._step(longest, road)
        return Line(highest.peaks, others, timed.flops, timed.parameters, longest.tokens, self.layers,
                    self._outside())

    def _evaluation(self, rows: Rows, road: Road) -> Bytes:
        first, second = self._traced("evaluation", lambda count: trace_evaluation(self._models, count, rows, road),
                                     rows, road.loss_rows, road.sharing)
        return on_the_line(first, second, self._share)

    def _highest(self, candidates: Sequence[Candidate], road: Road) -> TracedStep:
        """The step of the micro-batch that needs most.

        What a micro-batch takes grows with its tokens and with those of them that are supervised. So much for each as
        two of them say, the others are told apart by; the one that should be the highest is traced too. So is the one
        with the largest mask, where that weighs anything.
        """
        steps = {candidate: self._step(candidate.rows, road) for candidate in (candidates[0], candidates[-1])}
        widest = max(candidates, key=lambda one: one.mask_bytes)
        if widest.mask_bytes - candidates[0].mask_bytes > MASKS_MATTER * _peak_of(steps[candidates[0]]):
            steps[widest] = self._step(widest.rows, road)
        states = {cause: size for cause, size in next(iter(steps.values())).peaks["forward/before"].items()
                  if cause in ("weights", "adapters", "optimizer")}
        gradients = max(step.peaks["forward/before"].get("gradients", 0.0) for step in steps.values())

        def fixed(candidate: Candidate) -> float:
            return sum(states.values()) + gradients * candidate.rows.later

        sizes = [[candidate.tokens, candidate.supervised] for candidate in steps]
        moving = [_peak_of(step) - fixed(candidate) for candidate, step in steps.items()]
        of_each = np.linalg.lstsq(np.array(sizes, float), np.array(moving), rcond=None)[0]
        likely = max(candidates, key=lambda one: fixed(one) + of_each @ (one.tokens, one.supervised))
        return max([*steps.values(), self._step(likely.rows, road)], key=_peak_of)

    def _step(self, rows: Rows, road: Road) -> TracedStep:
        first, second = self._traced("step", lambda count: trace_step(self._models, count, rows, road), rows, road)
        peaks = {label: on_the_line(first.peaks[label], second.peaks[label], self._share)
                 for label in second.peaks if label in first.peaks and label != START}
        parameters = Parameters(self._between(first.parameters.total, second.parameters.total),
                                self._between(first.parameters.trainable, second.parameters.trainable))
        return TracedStep(peaks, self._between(first.flops, second.flops), parameters)

    def _traced(self, name: str, follow: Callable[[int], Any], *key: Any) -> tuple[Any, Any]:
        if (name, *key) not in self._known:
            found = [follow(count) for count in self._counts]
            self._known[(name, *key)] = found[0], found[-1]
        first, second = self._known[(name, *key)]
        return first, second

    def _between(self, first: float, second: float) -> int:
        return round(first + self._share * (second - first))


@functools.lru_cache(maxsize=64)
def _traces_of(shape: str) -> dict[Any, Any]:
    """Traces of one subject so far; a change of any word in `shape` may give others."""
    return {}


def _together(part: Bytes) -> float:
    return sum(part.values())


def _peak_of(step: TracedStep) -> float:
    return max(map(_together, step.peaks.values()))


def footprint(line: Line, division: Division, device: Device) -> Footprint:
    """What a rank holds, when states are divided so, on such a device."""
    start = next(iter(line.step.values()))
    held = {cause: start.get(cause, 0.0) for cause in STATES}

    def there(part: Bytes, *, computing: bool, training: bool = False) -> defaultdict[str, float]:
        found = divided(part, held, line.layers, division, outside=line.outside, computing=computing,
                        training=training)
        found["allocator_slack"] = device.slack * sum(found[cause] for cause in MOVING)
        found["framework"] = device.framework_bytes
        return found

    parts = [there(part, computing=True, training=True) for part in line.step.values()]
    found: dict[str, Bytes] = {"step": max(parts, key=lambda part: sum(part.values()))}
    optimizer = {"optimizer": held["optimizer"]}  # scored in the middle of a run, where its state lies there
    found.update((name, there({**part, **optimizer}, computing=True)) for name, part in line.others.items())
    found.update((name, there(part, computing=False)) for name, part in _still(held, division).items())
    if division.weights_too and device.on_cpu:
        found["load"] = {"weights": held["weights"], "adapters": held["adapters"]}
        found["save"] = {**found["save"], "temporaries": held["weights"] + 2 * held["adapters"]}
    order = ("load", "step", "evaluation", "generation", "save", "resume")
    return Footprint({name: found[name] for name in order if name in found}, line.flops, line.tokens, line.parameters)


def _still(held: Bytes, division: Division) -> dict[str, Bytes]:
    """Instants without a batch. What is saved is read again beside the live weights: an adapter, or the whole model."""
    again = 0.0 if division.weights_too else held["adapters"] or held["weights"]
    return {"load": {"weights": held["weights"], "adapters": held["adapters"]},
            "save": {**held, "temporaries": again}, "resume": held}
