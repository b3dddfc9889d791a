"""Where next-token losses are computed: without the logits of other tokens, wherever this very model is proven to
give the same that way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from peftune.config.schema import ModelConfig
from peftune.errors import Fault, ModelError
from peftune.model.next_token import looks_ahead, road_fault, take_road
from peftune.model.precision import DTYPES, autocast
from peftune.numerics.linear_loss import chunk_rows
from peftune.parallel.world import World


def choose_road(
    config: ModelConfig, model: nn.Module, model_config: PreTrainedConfig, *, world: World, divided: bool,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> str | None:
    """Prepare a model's forward pass; None, or why losses come from the whole logits.

    Args:
        config: the model section.
        model: unwrapped, with its adapter, on its device, prepared by `end_in_losses`.
        model_config: of the model.
        world: all ranks must agree.
        divided: ranks may gather the output layer for each call of it, so they call it once.
        autocast: precision of forward passes.

    Raises:
        ModelError: the model sees the tokens that it is to predict.
    """
    rows = rows_at_once(config, model_config, world.device, divided=divided)
    if rows is None:
        return "model.compile=true needs shapes that do not depend on the targets"
    vocabulary = model_config.get_text_config().vocab_size
    if world.same(looks_ahead(model, vocabulary=vocabulary, dtype=DTYPES[config.dtype], device=world.device,
                              autocast=autocast)):
        raise ModelError(Fault(
            kind="model", message=f"{model_config.model_type} predicts each token with those after it in sight, and "
            "would learn to copy the next one", mend="a decoder; an encoder suits the tasks of classification"))
    why = world.same(road_fault(model, vocabulary=vocabulary, dtype=DTYPES[config.dtype], device=world.device,
                                autocast=autocast, whole=divided))
    if why is None:
        take_road(model, rows)
    return why


def road_notes(
    config: ModelConfig, model: nn.Module, model_config: PreTrainedConfig, *, world: World, divided: bool
) -> list[str]:
    """Choose the road; what a person should know of it. Arguments as for `choose_road`."""
    why = choose_road(config, model, model_config, world=world, divided=divided,
                      autocast=autocast(config, world.device))
    notes = [] if why is None else [f"losses from the logits of every token ({why})"]
    routed = model_config.get_text_config().to_dict().get("output_router_logits", False)
    return [*notes, "the loss of its routers (output_router_logits) is left out"] if routed else notes


def rows_at_once(
    config: ModelConfig, model_config: PreTrainedConfig, device: torch.device, *, divided: bool
) -> int | None:
    """Tokens whose logits are to exist at once, see `EndsInLosses.rows`, if the model is proven to allow it."""
    if config.compiles_whole:
        return None
    return 0 if divided else chunk_rows(model_config.get_text_config().vocab_size, device)
