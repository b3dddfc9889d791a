"""The part of the composition root that makes the model (loaded, adapted, beside a frozen twin) and publishes it."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peftune.config.schema import ModelConfig, RunConfig
from peftune.data.layouts import Layout
from peftune.data.prepare import Prepared
from peftune.errors import ConfigError, Fault
from peftune.loop.data_start import start_from_planned_data
from peftune.loop.publish import write_text
from peftune.model.adapters import base_of
from peftune.model.assemble import Parameters, assemble
from peftune.model.card import model_card
from peftune.model.content import fingerprints
from peftune.model.download import Tell
from peftune.model.eva import reads_data
from peftune.model.folder import needs_config
from peftune.model.fusion import fused_passes
from peftune.model.heads import head_for
from peftune.model.lean import layers_of_passes, make_lean
from peftune.model.load import Loaded, adjust_config, load_weights, local_source
from peftune.model.next_token import end_in_losses, road_of, take_road
from peftune.model.packing import use_packing
from peftune.model.precision import DTYPES, enable_gradient_checkpointing
from peftune.model.quantize import quantised_by, quantization_of
from peftune.model.reference import Reference, reference_of
from peftune.model.save import save_model
from peftune.model.vocabulary import new_rows
from peftune.parallel.names import BY_MODULE
from peftune.parallel.strategy import Strategy
from peftune.tasks import TASKS
from peftune.tasks.text import Text

RELOAD_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Largest difference of logits between the trained model and its saved folder. Equal weights run through equal
code, so this is only room for kernels that sum in varying order."""
OTHER_DEVICE_TOLERANCE = {"float32": 1e-2, "bfloat16": 0.5}
"""The same where the folder is loaded on the host and the live model computes on GPUs: other kernels, other sums."""


def model_for_training(
    config: RunConfig, text: Text, data: Prepared, strategy: Strategy, tell: Tell
) -> tuple[Any, Loaded]:
    """The model as training begins with it, and what its checkpoint did not hold. `tell`: of its download."""
    task, targets = text.encoder.task, data.targets
    adjust_config(text.config, dropout=config.model.dropout, problem=targets.problem, names=targets.names,
                  pad_id=text.tokenizer.pad_token_id)
    quantization_of(config.model, text.config, adapted=config.adapter is not None, divided=strategy.lockstep)
    model, loaded = assemble(config.model, config.adapter, local_source(text.source), text.config, task.auto_class,
                             task=config.task, new_head=task.new_head, seed=config.seed,
                             rows=new_rows(text.tokenizer, config.model), device=strategy.world.device,
                             load=functools.partial(load_weights, tell=tell))
    if task.next_token:
        end_in_losses(model)
    if reads_data(model):
        start_from_planned_data(config.model, model, data, strategy, batch_size=config.train.batch_size,
                                seed=config.seed, pad_id=text.tokenizer.pad_token_id)
    if not config.model.compiles_whole:
        by_module = strategy.name in BY_MODULE
        make_lean(model, by_module=by_module)
        if config.model.compile and layers_of_passes(model):
            passes = fused_passes(strategy.world.device, DTYPES[config.model.dtype])
            make_lean(model, by_module=by_module, passes=passes)
    return model, loaded


def content_of(config: RunConfig, text: Text) -> dict[str, str]:
    """SHA-256 of what the model is read from, by file name, and of the chat template, wherever that comes from."""
    beneath = [config.adapter.stack_on] if config.adapter is not None and config.adapter.stack_on else []
    found = fingerprints(text.source, config.model.revision, beneath)
    if text.template != "none":
        found["chat template"] = hashlib.sha256(str(text.tokenizer.chat_template).encode()).hexdigest()
    return found


def recomputes(config: RunConfig, model: Any) -> bool:
    """Let a model compute its activations again in backward, if it can.

    Raises:
        ConfigError: it cannot, and that is asked for.
    """
    can = enable_gradient_checkpointing(model)
    if not can and config.model.gradient_checkpointing is True:
        raise ConfigError(Fault(
            kind="config", message=f"model.gradient_checkpointing = true: {base_of(model).config.model_type} cannot "
            "compute its activations again", mend="model.gradient_checkpointing=false"))
    return can


def fusion_notes(config: ModelConfig, model: nn.Module) -> list[str]:
    """What model.compile=parts has found in the model, for a person."""
    if config.compile != "parts":
        return []
    layers = layers_of_passes(model)
    return [f"elementwise parts of {layers} layers are compiled" if layers else
            "model.compile=parts knows no layer of this model and changes nothing"]


def model_facts(config: RunConfig, loaded: Loaded, counts: Parameters, layout: Layout) -> dict[str, Any]:
    """What the manifest and the model card say of the model."""
    loads_with = head_for(TASKS[config.task](config.train, config.evaluation).auto_class, loaded.model.config).__name__
    return {"task": config.task, "loads_with": loads_with,
            "trainable_parameters": counts.trainable, "total_parameters": counts.total,
            "added_tokens": len(config.model.added_tokens) + len(config.model.added_special_tokens),
            "new_modules": list(loaded.new_modules), "quantization": quantised_by(loaded.model), "layout": layout.name}


def method_of(config: RunConfig) -> str:
    """What the config trains, in words."""
    return "full fine-tuning" if config.adapter is None else config.adapter.method


def publish(
    config: RunConfig, facts: dict[str, Any], tokenizer: PreTrainedTokenizerBase, model: Any,
    weights: dict[str, Tensor], folder: Path,
) -> None:
    """Fill a folder with trained weights and their card. `facts`: of `model_facts`. The others: see `save_model`."""
    save_model(model, weights, tokenizer, folder,
               with_config=needs_config(config.task, adds_tokens=facts["added_tokens"] > 0))
    card = model_card(config.model.name_or_path, config.model.revision, config.task, method_of(config), facts)
    write_text(folder / "README.md", card)


def reference_for(model: nn.Module, frozen: nn.Module | None, strategy: Strategy, layout: Layout) -> Reference:
    """The model without its adapter; a copy that is placed and packed as the model itself, where there is none."""
    if frozen is None:
        return reference_of(model)
    take_road(frozen, road_of(model))
    if layout.kind != "padded":
        use_packing(frozen, pooled=False, first_position=layout.first_position)
    return reference_of(strategy.prepare_frozen(frozen))


def usual_tolerance(config: RunConfig, strategy: Strategy) -> float:
    """How far logits of the saved folder may lie from the trained model's."""
    elsewhere = strategy.lockstep and strategy.world.device.type != "cpu"
    return (OTHER_DEVICE_TOLERANCE if elsewhere else RELOAD_TOLERANCE)[config.model.dtype]
