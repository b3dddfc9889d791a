"""A model without values: every shape and type of the real one, no memory. Operators on it compute shapes alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from peftune.config.schema import AdapterConfig, ModelConfig
from peftune.model.assemble import assemble
from peftune.model.heads import head_for
from peftune.model.hollow_tensor import HollowTensor
from peftune.model.load import Loaded
from peftune.model.quantize import quantise_hollow, quantised_tensors, quantization_of
from peftune.model.vocabulary import NO_ROWS, NewRows

SAME_SHAPES = ("loftq", "eva", "gaussian", "orthogonal")
"""Starts of a LoRA that read weights or data and change no shape."""


class Params4bit(HollowTensor):
    """By the name of bitsandbytes' class PEFT tells what it has to dequantise, as for DoRA."""


class Int8Params(HollowTensor):
    """Likewise."""


def hollow_model(
    model: ModelConfig, adapter: AdapterConfig | None, source: str, model_config: PreTrainedConfig, auto_class: Any, *,
    task: str, new_head: bool, rows: NewRows = NO_ROWS,
) -> PreTrainedModel | PeftModel:
    """The model that `assemble` would give from this config, without its checkpoint. Takes no random numbers.

    Attention that needs a GPU is SDPA here, which keeps the same tensors for backward. A checkpoint that is quantised
    already is taken to be as this project quantises.

    Raises:
        PeftuneError: it cannot be trained so (see `quantization_of`), or the adapter does not fit it.
    """
    def load(
        config: ModelConfig, source: str, model_config: PreTrainedConfig, auto_class: Any, *, dtype: torch.dtype,
        new_head: bool, device: torch.device,
    ) -> Loaded:
        attention = "eager" if config.attention == "eager" else None
        made = head_for(auto_class, model_config).from_config(model_config, dtype=dtype, attn_implementation=attention,
                                      trust_remote_code=config.trust_remote_code)
        kind = quantization_of(config, model_config, adapted=adapter is not None, divided=False)
        quantise_hollow(made, kind, auto_class, model_config, dtype=dtype, trust_remote_code=config.trust_remote_code)
        return Loaded(made, ())

    if adapter is not None and adapter.start in SAME_SHAPES:
        adapter = adapter.model_copy(deep=True)
        assert adapter.model_extra is not None
        adapter.model_extra.pop("init_lora_weights")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        result, _ = assemble(model, adapter, source, copy.deepcopy(model_config), auto_class, task=task,
                             new_head=new_head, seed=0, rows=rows, load=load)
    _take_types_of_bases(result, trained_too=model.pure_bf16)
    _lie_on_cpu(result)
    return result


def _take_types_of_bases(model: nn.Module, *, trained_too: bool) -> None:
    """Give adapters their base layer's type, as PEFT does to those with values; trained ones may have been widened."""
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        base = next(module.get_base_layer().parameters(), None)
        if base is None or not base.is_floating_point():
            continue
        for name in (*module.adapter_layer_names, *module.other_param_names):
            held = vars(module)["_modules"].get(name)
            for parameter in held.parameters() if isinstance(held, (nn.ModuleDict, nn.ParameterDict)) else ():
                if parameter.is_floating_point() and (trained_too or not parameter.requires_grad):
                    parameter.data = parameter.data.to(base.dtype)


def _lie_on_cpu(model: nn.Module) -> None:
    """Give every tensor the CPU as its device, so that operators choose the kernels that they choose there."""
    done: dict[int, tuple[Tensor, Tensor]] = {}  # the old ones too: a number of one that is gone would be given again

    def moved(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            hollow = HollowTensor(tensor.detach().to("meta"))
            done[id(tensor)] = tensor, (nn.Parameter(hollow, requires_grad=tensor.requires_grad)
                                        if isinstance(tensor, nn.Parameter) else hollow)
        return done[id(tensor)][1]

    for module in model.modules():
        for holder, attribute, tensor in quantised_tensors(module):
            setattr(holder, attribute, moved(tensor))
        state = vars(module).get("quant_state")
        for store in vars(module).values():  # of parameters, of buffers, and an adapter's of places or prompts
            if isinstance(store, dict):
                store.update({name: moved(tensor) for name, tensor in store.items() if isinstance(tensor, Tensor)})
        weight: Any = module._parameters.get("weight")
        if state is not None:
            weight.quant_state, weight.__class__ = state, Params4bit
        elif type(module).__name__ == "Int8Linear":
            weight.__class__ = Int8Params
