"""One step, one evaluation batch and one generation of a model without values, followed byte by byte.

The code that runs is the run's own: the task's loss, `train_step`, the optimizer, the layouts. So whatever it keeps for
backward is counted, and a change of it needs no change here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftune.data.examples import Batch, Example
from peftune.data.layouts import PADDED, Layout, lay_out
from peftune.loop.optimizer import build_optimizer
from peftune.loop.step import StepWork, train_step
from peftune.model.assemble import Parameters, count
from peftune.model.packing_proof import hears_lengths
from peftune.model.precision import autocast
from peftune.numerics.losses import IGNORE
from peftune.parallel.single import Single
from peftune.parallel.world import World
from peftune.plan.layers import Bytes
from peftune.plan.live import LiveBytes
from peftune.plan.models import Models, Opened, Road, Subject

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU, None)


@dataclass(frozen=True, slots=True)
class Rows:
    """Examples of a micro-batch: how long each is, and how many of its tokens are supervised."""

    lengths: tuple[int, ...]
    supervised: tuple[int, ...]
    later: bool = False
    """An earlier micro-batch of the same step has left its gradients."""

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class TracedStep:
    """What the trace of a step found."""

    peaks: Mapping[str, Bytes]
    """The highest within each part of the step."""
    flops: float
    """Of its micro-batch, forward and backward."""
    parameters: Parameters


def lies_end_to_end(models: Models, layers: int, road: Road) -> bool:
    """Whether a model of `layers` layers takes packed micro-batches, as far as that shows without values."""
    opened, subject = models.opened(layers, road), models.subject
    if opened.layout.kind != "segments":
        return opened.layout.kind != "padded"
    inputs = batch_of(subject, Rows((3, 2), (1, 1)), opened.layout).inputs
    with autocast(subject.config.model, CPU)():
        return hears_lengths(opened.model, inputs)


def trace_step(models: Models, layers: int, rows: Rows, road: Road) -> TracedStep:
    """Follow one step of a model of `layers` layers.

    Args:
        models: of what is planned.
        layers: of the model, instead of its own number.
        rows: a micro-batch of the step.
        road: how the run computes.
    """
    opened, subject = models.opened(layers, road), models.subject
    task = subject.task

    def losses(live_model: nn.Module, batch: Batch) -> Tensor:
        return task.losses(task.forward(live_model, batch, opened.reference), batch, subject.targets)

    peaks = _step(opened, subject, layers, losses, batch_of(subject, rows, opened.layout), later=rows.later)
    return TracedStep(peaks, opened.live.flops, count(opened.model))


def trace_evaluation(models: Models, layers: int, rows: Rows, road: Road) -> Bytes:
    """The peak of an evaluation batch, which is padded unless ranks share its rows."""
    opened, subject = models.opened(layers, road), models.subject
    task = subject.task
    batch = batch_of(subject, rows, PADDED if road.sharing == 1 else opened.layout)

    def work() -> Tensor:
        outputs = task.forward(opened.model, batch, opened.reference)
        return task.losses(outputs, batch, subject.targets)

    with torch.no_grad(), autocast(subject.config.model, CPU)():
        return _peak(opened, work)


def trace_generation(models: Models, layers: int, rows: int, tokens: int) -> Bytes:
    """The peak of generating. All tokens at once instead of one after another: the cache is as large at the end, and
    one layer's is copied when it grows."""
    opened = models.opened(layers)
    ids = torch.ones(rows, tokens, dtype=torch.int64)

    def work() -> Any:
        output = opened.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
        kept = output.get("past_key_values")  # Mamba's states have no name in common, and do not grow
        layers = [] if kept is None else kept.layers
        states = ([vars(layer).get("keys"), vars(layer).get("values")] for layer in layers)
        growing = next((pair for pair in states if all(isinstance(state, Tensor) for state in pair)), [])
        return output, [state.clone() for state in growing]

    with torch.no_grad(), autocast(models.subject.config.model, CPU)():
        return _peak(opened, work)


def _step(
    opened: Opened, subject: Subject, layers: int, losses: Any, batch: Batch, *, later: bool
) -> dict[str, Bytes]:
    """Peaks within a step that is not the first one: the optimizer has its state, and an earlier micro-batch of the
    same step has left its gradients, if there is one."""
    model, live = opened.model, opened.live
    strategy, config = Single(ALONE), subject.config
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(model.train(), config.train)
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if later:
        live.hold((p.grad for p in trainable if p.grad is not None), "gradients")
    else:
        optimizer.zero_grad()
    live.hold((value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)),
              "optimizer")

    def watched(live_model: nn.Module, batch: Batch) -> Tensor:
        live.label, live.cause = "forward/before", "activations"
        result: Tensor = losses(live_model, batch)
        live.label, live.cause = "backward/after", "logits_and_loss"
        return result

    def inspect(_: nn.Module) -> None:
        live.hold((p.grad for p in trainable if p.grad is not None), "gradients")
        live.label, live.cause = "optimizer", "temporaries"

    handles = _mark_layers(live, model, layers)
    work = StepWork([batch], 1, 1, 1, 1, list)
    with live:
        train_step(model, work, optimizer, strategy, losses=watched, autocast=autocast(config.model, CPU),
                   max_grad_norm=config.train.max_grad_norm, inspect=inspect)
    for handle in handles:
        handle.remove()
    for parameter in trainable:
        parameter.grad = None
    return {label: peak.by_cause() for label, peak in live.peaks.items()}


def _mark_layers(live: LiveBytes, model: nn.Module, count: int) -> list[Any]:
    """Say where the step is: forward and backward, before, in or after the layers."""
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    if (stack := next(stacks, None)) is None:
        return []

    def name(index: int) -> str:
        return "first layer" if index == 0 else "last layer" if index == count - 1 else "middle layers"

    def enter(index: int, *_: Any) -> None:
        if live.label.startswith("forward"):  # in backward, a layer that is computed again
            live.label = f"forward/{name(index)}"

    def leave(index: int, module: nn.Module, inputs: Any, output: Any) -> None:
        if not live.label.startswith("forward"):
            return
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(partial(back, index))
        if index == count - 1:
            live.label, live.cause = "forward/after", "logits_and_loss"

    def back(index: int, _: Tensor) -> None:
        live.label, live.cause = f"backward/{name(index)}", "temporaries"

    return [handle for index, layer in enumerate(stack) for handle in (
        layer.register_forward_pre_hook(partial(enter, index)), layer.register_forward_hook(partial(leave, index)))]


def _peak(opened: Opened, work: Any) -> Bytes:
    opened.model.eval()
    live = opened.live
    live.cause = "activations"
    with live:
        held = work()  # alive until the peak is read
    del held
    return live.peaks[live.label].by_cause()


def batch_of(subject: Subject, rows: Rows, layout: Layout) -> Batch:
    """A micro-batch of made-up examples, with real values: its masks decide what is computed."""
    kind, width = subject.targets.kind, subject.targets.width

    def targets(length: int, supervised: int) -> Sequence[float]:
        if kind in ("token", "pair"):
            return [IGNORE] * (length - supervised) + [1] * supervised
        return [0] if kind == "class" else [0.0] * width

    examples = [Example([1] * length, targets(length, wanted), 1, length, {}, first_part=length // 2)
                for length, wanted in zip(rows.lengths, rows.supervised, strict=True)]
    return lay_out(examples, range(len(examples)), layout=layout, pad_id=0, kind=kind, width=width, device=CPU)
