"""A base model with its head and adapter, in the right types: ready for a strategy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from peftune.config.schema import AdapterConfig, ModelConfig
from peftune.errors import Fault, ModelError
from peftune.model.adapters import attach, peft_config
from peftune.model.beneath import put_beneath
from peftune.model.earlier import check_same_base, earlier_folder, frozen_beneath, reading_adapter
from peftune.model.folder import CONFIG
from peftune.model.load import Loaded, load_weights
from peftune.model.loftq import start_from_rounding, whole_weights
from peftune.model.precision import emulates_bfloat16, keep_trainable_in_float32, weight_dtype
from peftune.model.published import published_weights
from peftune.model.quantize import stored_kind, values_in
from peftune.model.reach import freeze_unreached, leave_out, reach_notes, stacked_weights
from peftune.model.save import CPU
from peftune.model.vocabulary import NO_ROWS, NewRows, resize, token_rows


@dataclass(frozen=True, slots=True)
class Parameters:
    """Counts of weights."""

    total: int
    trainable: int


def assemble(
    model: ModelConfig, adapter: AdapterConfig | None, source: str, model_config: PreTrainedConfig, auto_class: Any, *,
    task: str, new_head: bool, seed: int, rows: NewRows = NO_ROWS, device: torch.device = CPU,
    load: Callable[..., Loaded] = load_weights,
) -> tuple[PreTrainedModel | PeftModel, Loaded]:
    """Load the weights, attach the adapter, set what trains. New weights depend on the seed alone.

    `new_head`: the task has an output layer that a checkpoint may lack. `rows`: of the added tokens. `device`: where
    quantised weights are made. `load`: in place of `load_weights`.

    Raises:
        ModelError, ConfigError: see `load_weights`, `peft_config`, `attach`, `earlier`.
    """
    torch.manual_seed(seed)
    loaded = load(model, source, model_config, auto_class, new_head=new_head,
                  dtype=weight_dtype(model, adapted=adapter is not None), device=device)
    resize(loaded.model, rows)
    if model.dropout is not None:
        for module in loaded.model.modules():
            if isinstance(module, torch.nn.Dropout):  # output layers of decoders have a rate that no config field sets
                module.p = model.dropout
    result: PreTrainedModel | PeftModel = loaded.model
    if adapter is None:
        freeze_unreached(loaded.model)
    else:
        result = _adapted(loaded, model.revision, adapter, source, rows, task=task, new_head=new_head)
        if adapter.start == "loftq" and adapter.init_from is None:
            start_from_rounding(result, whole_weights(
                model, source, model_config, auto_class, loaded.model, new_head=new_head,
                dtype=weight_dtype(model, adapted=True)))
    keep_trainable_in_float32(result, model)
    if isinstance(result, PeftModel) and adapter is not None and adapter.init_from is not None:
        folder = earlier_folder("init_from", adapter.init_from)
        with reading_adapter("init_from", folder):
            _load_earlier(result, folder, loaded.model)
    return result, loaded


def _adapted(
    loaded: Loaded, revision: str | None, adapter: AdapterConfig, source: str, rows: NewRows, *, task: str,
    new_head: bool,
) -> PeftModel:
    config = peft_config(adapter, task, loaded.new_modules or loaded.head(new_head), adds_tokens=bool(rows.ids))
    config.revision = revision
    if rows.ids and not adapter.init_from:
        config.trainable_token_indices = token_rows(loaded.model, rows)
    if adapter.init_from is None:
        leave_out(config, adapter, loaded.model)
    else:
        check_same_base("init_from", config, source)
        with reading_adapter("init_from", Path(adapter.init_from)):
            _check_rows(config, loaded.model, adapter.init_from)
    if adapter.stack_on is None:
        return attach(loaded.model, config)
    below, folder = frozen_beneath(adapter.stack_on)
    check_same_base("stack_on", below, source)
    result = attach(loaded.model, config)
    with reading_adapter("stack_on", folder):
        put_beneath(result, below, folder)
    return result


def _check_rows(config: PeftConfig, model: PreTrainedModel, name: str) -> None:
    """An earlier adapter's rows for added tokens need the same tokens here."""
    rows = config.trainable_token_indices or {} if isinstance(config, LoraConfig) else {}
    ids = rows if isinstance(rows, list) else [number for part in rows.values() for number in part]
    if max(ids, default=0) >= model.get_input_embeddings().weight.shape[0]:
        raise _unfit(Path(name), "has rows for tokens that the model lacks",
                     "write the earlier run's model.added_tokens here too")


@torch.no_grad()
def _load_earlier(model: PeftModel, folder: Path, base: PreTrainedModel) -> None:
    """Put an earlier adapter's weights, an output layer among them, into the live model's.

    Raises:
        ModelError: they do not fit, or the output layer was trained for other classes.
    """
    path = folder / CONFIG
    known = json.loads(path.read_text("utf-8")).get("id2label") if path.is_file() else None
    theirs, mine = (list((labels or {}).values()) for labels in (known, base.config.id2label))
    if theirs and theirs != mine and any("modules_to_save" in name for name, _ in model.named_parameters()):
        raise _unfit(folder, f"was trained for the classes {theirs[:8]}, not {mine[:8]}",
                     "data.labels with the earlier run's classes, in their order")
    live, weights = dict(model.named_parameters()), published_weights(model, folder)
    wrong = [name for name, tensor in weights.items() if tensor.shape != live[name].shape]
    if wrong:
        raise _unfit(folder, f"{wrong[0]} has shape {list(weights[wrong[0]].shape)}, not {list(live[wrong[0]].shape)}",
                     "give an adapter of this very model and task")
    for name, tensor in weights.items():
        live[name].copy_(tensor)


def _unfit(folder: Path, message: str, mend: str) -> ModelError:
    return ModelError(Fault(kind="model", file=str(folder), message=f"adapter.init_from: {message}", mend=mend))


def count(model: torch.nn.Module) -> Parameters:
    """Weights of a model; shared ones count once."""
    parameters = list(model.parameters())
    return Parameters(sum(map(values_in, parameters)), sum(values_in(p) for p in parameters if p.requires_grad))


def weight_notes(loaded: Loaded, counts: Parameters, dtype: str) -> list[str]:
    """What trains, how the rest is kept, what is new, and whether `model.dtype` suits the device, for a person."""
    kind = stored_kind(loaded.model.config)
    kept = f", the others are kept in {kind}" if kind != "none" else ""
    if kept and (stacked := stacked_weights(loaded.model)):
        kept += f" but the experts' {', '.join(sorted(stacked))}, which bitsandbytes leaves as they are"
    notes = [f"{counts.trainable:,} of {counts.total:,} weights train{kept}", *reach_notes(loaded.model)]
    if dtype == "bfloat16" and emulates_bfloat16(loaded.model.device):
        notes.append("this GPU has no products in bfloat16 and computes them slowly: model.dtype=float32")
    return [*notes, f"new: {', '.join(loaded.new_modules)}"] if loaded.new_modules else notes
