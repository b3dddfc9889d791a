"""What of a model text does not pass through, and what no adapter can be put beside."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from peftune.config.schema import AdapterConfig

ALL_LINEAR = "all-linear"
_MAMBA, _MAMBA2 = ("dt_proj", "out_proj", "x_proj"), ("out_proj",)
IN_OTHER_HANDS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "bamba": _MAMBA2, "falcon_h1": _MAMBA2, "granitemoehybrid": _MAMBA2, "mamba2": _MAMBA2, "nemotron_h": _MAMBA2,
    "zamba2": _MAMBA2, "mamba": _MAMBA, "falcon_mamba": _MAMBA, "jamba": ("dt_proj",),
    "gemma3n_text": ("correction_coefs", "prediction_coefs"), "llama4_text": ("router",), "phimoe": ("router",),
    "deepseek_v4": ("o_a_proj",),
})
"""By `model_type` of the text model: linear layers whose owner reads their weights itself, as Mamba's kernels do, or
that are more than a product, as some routers are. Adapters beside them would not be seen, and PEFT refuses some; what
quantisation puts in their place would fail."""


def in_other_hands(config: PreTrainedConfig) -> tuple[str, ...]:
    """Last parts of such layers' names in a model of this config."""
    return IN_OTHER_HANDS.get(config.get_text_config().model_type, ())


def beside_text(model: PreTrainedModel) -> tuple[str, ...]:
    """Modules that read images or sound, or carry them to the text model; none where a model reads text alone."""
    text, body = model.config.get_text_config(), model.base_model
    if text is model.config or body is model:
        return ()
    parts = dict(body.named_children())
    readers = {name for name, part in parts.items() if isinstance(part, PreTrainedModel) and part.config is text}
    if not readers:
        return ()
    return tuple(f"{model.base_model_prefix}.{name}" for name, part in parts.items()
                 if name not in readers and any(True for _ in part.parameters()))


def freeze_unreached(model: PreTrainedModel) -> None:
    """Leave as it is what no gradient would reach: what text does not pass through, and what the model's own code
    freezes, which loading forgets (the biases of Ernie 4.5's routers)."""
    for name in beside_text(model):
        model.get_submodule(name).requires_grad_(False)
    with torch.device("meta"):
        made = type(model)(copy.deepcopy(model.config))
    for name, parameter in made.named_parameters():
        if not parameter.requires_grad:
            model.get_parameter(name).requires_grad_(False)


def leave_out(config: PeftConfig, adapter: AdapterConfig, model: PreTrainedModel) -> None:
    """Add to a method's `exclude_modules` what text does not pass through; where all linear layers are asked for, those
    too that are in other hands."""
    fields: dict[str, Any] = vars(config)
    if "exclude_modules" not in fields:
        return
    patterns = [rf"{re.escape(name)}\..*" for name in beside_text(model)]
    if str(adapter.fields.get("target_modules")).lower() == ALL_LINEAR:
        patterns += [rf"(.*\.)?{name}" for name in in_other_hands(model.config)]
    theirs = fields["exclude_modules"] or []
    asked = [theirs] if isinstance(theirs, str) else [rf"(.*\.)?{re.escape(name)}" for name in theirs]
    if patterns:
        fields["exclude_modules"] = "|".join(f"({pattern})" for pattern in [*asked, *patterns])


def reach_notes(model: PreTrainedModel) -> list[str]:
    """What does not train although one may think so, for a person. `model`: the base, with its adapter in place."""
    aside = [name.rpartition(".")[2] for name in beside_text(model)]
    notes = [f"no text passes through {', '.join(aside)}: not trained"] if aside else []
    tuners = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not tuners:
        return notes
    plain = {name.rpartition(".")[2] for name, module in model.named_modules()
             if isinstance(module, nn.Linear) and not isinstance(module, BaseTunerLayer)}
    passed = sorted(plain.intersection(in_other_hands(model.config)))
    notes += [f"no adapter can be beside {', '.join(passed)}"] if passed else []
    wrapped = {module.parameter_name for module in tuners if isinstance(module, ParamWrapper)}
    stacked = stacked_weights(model) - wrapped
    return notes + ([f"experts hold {', '.join(sorted(stacked))} in one tensor each, which adapter.target_parameters "
                     "adapts"] if stacked else [])


def stacked_weights(model: nn.Module) -> set[str]:
    """Last parts of the names of experts' weights that are many matrices in one."""
    return {name.rpartition(".")[2] for name, parameter in model.named_parameters()
            if parameter.dim() == 3 and "expert" in name and not name.endswith(".weight")}
