"""An adapter folded into the weights that it was trained beside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from peftune.errors import Fault, ModelError
from peftune.model.adapters import BaseTunerLayer
from peftune.model.folder import ADAPTER

AS_IT_IS = "export without --merge: the adapter works beside its base, through peft"


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter's own config says."""

    base: str
    """Folder or hub id of the model that it was trained on."""
    revision: str | None
    method: str
    learns_prompt: bool


def adapter_of(folder: str) -> Adapter | None:
    """The adapter that lies in a folder; None where there is none.

    Raises:
        ModelError: its config cannot be read.
    """
    if not (Path(folder) / ADAPTER).is_file():
        return None
    try:
        config = PeftConfig.from_pretrained(folder)
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise ModelError(Fault(kind="model", file=f"{folder}/{ADAPTER}", message=f"cannot be read: {error}",
                               mend="give a folder that peft has written")) from error
    return Adapter(str(config.base_model_name_or_path), config.revision, config.peft_type.value.lower(),
                   config.is_prompt_learning)


def refuse_unmergeable(adapter: Adapter, name: str) -> None:
    """Say before anything is loaded what no merge can be.

    Raises:
        ModelError: the method learns a prompt, which is no change of weights.
    """
    if adapter.learns_prompt:
        raise _refused(name, adapter.method, "it learns a prompt beside the weights, not a change of them")


@torch.no_grad()
def merge(model: PeftModel, name: str) -> PreTrainedModel:
    """The base model with the adapter added to its weights and the trained modules in place of the old ones.

    The weights are added in the type they have: give float32 ones, so that nothing is rounded but the result.
    Tied embeddings of which the adapter changes one are untied, or the change would reach the other too.

    Args:
        model: changed in place, of no further use.
        name: what a person calls it.

    Raises:
        ModelError: the method, or this use of it, cannot merge.
    """
    method = model.active_peft_config.peft_type.value.lower()
    homeless = _biases_without_a_place(model)
    if homeless:
        raise _refused(name, method, f"lora_bias = true gives {homeless[0]}, one of {len(homeless)}, a bias, and the "
                       "layer beneath has none that it could be added to")
    tied = _untie(model)
    try:
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise _refused(name, method, str(error).splitlines()[0][:200]) from error
    if tied:
        _tie_if_equal(merged)
    merged.config.architectures = [type(merged).__name__]
    return merged.requires_grad_(False).eval()


def _refused(name: str, method: str, why: str) -> ModelError:
    return ModelError(Fault(kind="model", file=name, mend=AS_IT_IS,
                            message=f"adapter.method = {method} cannot be merged: {why}"))


def _biases_without_a_place(model: PeftModel) -> list[str]:
    """Layers whose adapter has a bias of its own while they have none."""
    return [name for name, module in model.get_base_model().named_modules()
            if isinstance(module, LoraLayer) and any(module.lora_bias.values())
            and "bias" not in dict(module.get_base_layer().named_parameters(recurse=False))]


def _untie(model: PeftModel) -> bool:
    """Give the output embeddings weights of their own if they share the input's and the adapter changes either."""
    base = model.get_base_model()
    into, out = base.get_input_embeddings(), base.get_output_embeddings()
    if out is None or (not isinstance(into, _WRAPPERS) and not isinstance(out, _WRAPPERS)):
        return False
    below, above = _unwrapped(into), _unwrapped(out)
    if below.weight is not above.weight:
        return False
    above.weight = nn.Parameter(above.weight.clone(), requires_grad=False)
    return True


def _tie_if_equal(model: PreTrainedModel) -> None:
    into, out = model.get_input_embeddings(), model.get_output_embeddings()
    equal = torch.equal(into.weight, out.weight)
    if equal:
        out.weight = into.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = equal


_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def _unwrapped(module: Any) -> Any:
    while isinstance(module, _WRAPPERS):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    return module
