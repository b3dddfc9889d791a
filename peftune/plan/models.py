"""What is planned, and its models without values, each prepared for the way in which a run computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from peftune.config.schema import AdapterConfig, ModelConfig, RunConfig
from peftune.data.layouts import PADDED, Layout
from peftune.data.targets import Targets
from peftune.model.hollow import hollow_model
from peftune.model.lean import make_lean
from peftune.model.load import first_position
from peftune.model.next_token import end_in_losses, take_road
from peftune.model.packing import use_packing
from peftune.model.precision import DTYPES, disable_gradient_checkpointing, enable_gradient_checkpointing
from peftune.model.quantize import quantised_tensors
from peftune.model.reference import Reference, narrow_products, reference_of
from peftune.model.vocabulary import NO_ROWS, NewRows
from peftune.plan.layers import of_layers
from peftune.plan.live import LiveBytes
from peftune.tasks.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is planned: a run's config, and what is known of its model and task before weights are loaded."""

    config: RunConfig
    source: str
    model_config: PreTrainedConfig
    """Adjusted as for training (`adjust_config`)."""
    task: Task
    targets: Targets
    rows: NewRows = NO_ROWS


@dataclass(frozen=True, slots=True)
class Road:
    """How a run computes, which its settings decide, and its devices and strategy."""

    recompute: bool
    """Activations are recomputed in backward."""
    packed: bool
    """Micro-batches are packed, if the model can take them."""
    loss_rows: int | None
    """Tokens whose logits exist at once, see `EndsInLosses.rows`."""
    sharing: int = 1
    """Ranks that share each row."""
    by_module: bool = False
    """Weights are gathered module by module, see `BY_MODULE`."""
    few_sizes: bool = False
    """Packed rows are filled up, see `Layout.few_sizes`."""


@dataclass(frozen=True, slots=True)
class LastPart:
    """A `Division` of one process: the part with the most supervised tokens, and others that answer with its own."""

    ranks: int

    @property
    def place(self) -> int:
        """The last one."""
        return self.ranks - 1

    def exchange(self, parts: Tensor) -> Tensor:
        """What is sent, laid end to end, and as much again that is received; in backward too."""
        return parts.contiguous() * 1

    def sum(self, tensor: Tensor) -> Tensor:
        """As large as the sum over ranks."""
        return tensor.clone()


@dataclass(frozen=True, slots=True)
class Opened:
    """A model without values, ready to be traced."""

    model: Any
    layout: Layout
    """Of its micro-batches."""
    reference: Reference | None
    """The untrained model that the loss compares with, if it does."""
    live: LiveBytes
    """What the model takes."""


class Models:
    """The models of a subject, by number of layers and road. To build one takes as long as to trace a step, so that
    each is kept for the next trace; a trace leaves no gradients and no hooks behind."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._made: dict[tuple[int, Road | None], tuple[Any, Layout, nn.Module | None]] = {}

    def opened(self, layers: int, road: Road | None = None) -> Opened:
        """A model of `layers` layers instead of its own number; without a `road` it computes no loss."""
        kind = layers, road and replace(road, loss_rows=None, recompute=False)
        if kind not in self._made:
            self._made[kind] = self._prepared(layers, road)
        model, layout, frozen = self._made[kind]
        subject, live = self.subject, LiveBytes()
        _hold_model(live, model, adapted=subject.config.adapter is not None)
        if frozen is not None:
            live.hold(frozen.parameters(), "weights")
        if road is None:
            return Opened(model, layout, None, live)
        if road.recompute:
            enable_gradient_checkpointing(model)
        else:
            disable_gradient_checkpointing(model)
        if subject.task.next_token:
            take_road(model, road.loss_rows)
        reference = reference_of(model if frozen is None else frozen) if subject.task.needs_reference else None
        return Opened(model, layout, reference, live)

    def _prepared(self, layers: int, road: Road | None) -> tuple[Any, Layout, nn.Module | None]:
        config = self.subject.config
        model = self._hollow(layers, road, config.model, config.adapter)
        if road is None:
            return model, PADDED, None
        layout = _layout(model, self.subject, road) if road.packed else PADDED
        if not self.subject.task.needs_reference or config.adapter is not None:
            return model, layout, None
        frozen = narrow_products(self._hollow(layers, road, config.model, None), DTYPES[config.model.dtype])
        return model, layout, frozen.requires_grad_(False).eval()

    def _hollow(self, layers: int, road: Road | None, config: ModelConfig, adapter: AdapterConfig | None) -> Any:
        subject, task = self.subject, self.subject.task
        made = hollow_model(config, adapter, subject.source, of_layers(subject.model_config, layers), task.auto_class,
                            task=subject.config.task, new_head=task.new_head, rows=subject.rows)
        if task.next_token and road is not None:
            end_in_losses(made)
        if not config.compiles_whole:
            make_lean(made, by_module=road is not None and road.by_module)
        return made


def _layout(model: Any, subject: Subject, road: Road) -> Layout:
    first = first_position(subject.model_config)
    kind = use_packing(model, pooled=subject.task.pooled, first_position=first, few_sizes=road.few_sizes)
    if kind is None:
        return PADDED
    return Layout(kind, first, LastPart(road.sharing) if road.sharing > 1 else None, road.few_sizes)


def _hold_model(live: LiveBytes, model: nn.Module, *, adapted: bool) -> None:
    for parameter in model.parameters():
        live.hold([parameter], "adapters" if adapted and parameter.requires_grad else "weights")
    live.hold(model.buffers(), "weights")
    for module in model.modules():
        live.hold((tensor for _, _, tensor in quantised_tensors(module)), "weights")
