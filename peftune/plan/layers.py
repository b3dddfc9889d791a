"""A model of fewer layers than its own, and the straight line on which its own number lies."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Mapping

from transformers import PreTrainedConfig

from peftune.config.schema import AdapterConfig

BY_NUMBER = ("layers_to_transform", "target_modules", "exclude_modules", "modules_to_save", "target_parameters",
             "layer_replication", "feedforward_modules", "rank_pattern", "alpha_pattern")
"""Fields of PEFT's configs that may name single layers."""
Bytes = Mapping[str, float]
"""Bytes by cause."""


def of_layers(model_config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same model with another number of layers."""
    short = copy.deepcopy(model_config)
    text = short.get_text_config()
    whole = text.num_hidden_layers
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == whole:
            setattr(text, key, value[:layers])
    text.num_hidden_layers = layers
    return short


def adapts_all_alike(adapter: AdapterConfig | None) -> bool:
    """Whether no layer is chosen by its number, by itself or in a name or pattern."""
    fields = {} if adapter is None else adapter.fields
    return not re.search(r"\d", str([fields.get(name) for name in BY_NUMBER]))


def traced_layers(model_config: PreTrainedConfig, *, alike: bool = True) -> tuple[int, ...]:
    """Numbers of layers to trace, from which the model's own follows on a straight line; itself where it is small.

    Models whose kinds of layers alternate need whole periods between the two, and the same remainder. Where an adapter
    does not treat all layers `alike`, the whole model is traced.
    """
    text = model_config.get_text_config()
    whole = text.num_hidden_layers
    if not alike:
        return (whole,)
    kinds = list(zip(*(value for value in vars(text).values() if isinstance(value, list) and len(value) == whole)))
    period = next((p for p in range(1, whole) if all(a == b for a, b in zip(kinds, kinds[p:]))), whole)
    small = 2 + (whole - 2) % period
    return (small, small + period) if small + period < whole else (whole,)


def on_the_line(first: Bytes, second: Bytes, share: float) -> defaultdict[str, float]:
    """`first` + `share` (`second` - `first`), cause by cause."""
    return defaultdict(float, {cause: first.get(cause, 0) + share * (second.get(cause, 0) - first.get(cause, 0))
                    for cause in {*first, *second}})
