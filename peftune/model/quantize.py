"""Frozen weights kept by bitsandbytes in 8 or 4 bits, and how a model is made ready to train an adapter over them.

Sources: Dettmers et al., 2022, arXiv:2208.07339 (int8 by rows); Dettmers et al., 2023, arXiv:2305.14314 (NF4 and double
quantisation). Products are computed in `model.dtype` from dequantised weights, in 8 bits too: LLM.int8() also rounds
activations, and chooses by batch which columns it spares, so that what lies beside an example would change its output.
"""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from peftune.config.schema import ModelConfig
from peftune.errors import ConfigError, Fault, MachineError, ModelError
from peftune.model.load_names import head_names

INSTALL = 'pip install "peftune[quantization]", or pip install "bitsandbytes>=0.50,<0.51"'
BLOCK, SCALES_BLOCK = 64, 256
"""4 bits: values that share a scale, and scales that share theirs; bitsandbytes' own."""


def require_bitsandbytes(key: str) -> None:
    """Raise MachineError unless bitsandbytes is installed. `key`: the setting that needs it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MachineError(Fault(kind="environment", message=f"{key} needs bitsandbytes, which is not installed",
                                 mend=INSTALL))


def quantization_of(model: ModelConfig, stored: PreTrainedConfig, *, adapted: bool, divided: bool) -> str:
    """How the weights will lie in memory: as `model.quantization` says, or as the checkpoint holds them already.

    Args:
        model: the config's section.
        stored: the checkpoint's own config.
        adapted: an adapter trains, not the weights.
        divided: each weight is divided among the ranks.

    Raises:
        ConfigError: the checkpoint is quantised in another way, or its weights were to train.
        ModelError: it is quantised by something else than bitsandbytes.
        MachineError: bitsandbytes is not installed.
    """
    kind = stored_kind(stored)
    if kind != "none":
        name = f"the checkpoint {model.name_or_path} is stored as {kind}"
        if model.quantization not in ("none", kind):
            raise _conflict(f"model.quantization = {model.quantization!r}: {name} already",
                            f"model.quantization={kind} or none, or the checkpoint before it was quantised")
        if not adapted:
            raise _conflict(f"adapter = null: {name}, and quantised weights do not train",
                            "adapter.method=lora, or the checkpoint before it was quantised")
        if divided:
            raise _conflict(f"{name}, in a layout of its own, which has not been seen to train divided among ranks",
                            f"--strategy ddp or zero2, or the unquantised checkpoint with model.quantization={kind}")
    kind = model.quantization if kind == "none" else kind
    if kind != "none":
        require_bitsandbytes(f"model.quantization = {kind!r}")
    return kind


def stored_kind(stored: PreTrainedConfig) -> str:
    """int8, nf4 or fp4 where the checkpoint's files are quantised, else none.

    Raises:
        ModelError: they are, by something else than bitsandbytes.
    """
    found = stored.to_dict().get("quantization_config")
    if not found:
        return "none"
    if found.get("load_in_8bit"):
        return "int8"
    if found.get("load_in_4bit"):
        return str(found["bnb_4bit_quant_type"])
    raise ModelError(Fault(
        kind="model", message=f"the checkpoint is quantised by {found.get('quant_method', 'an unnamed method')}, and "
        "peftune trains over bitsandbytes alone",
        mend="take the checkpoint before it was quantised, with model.quantization=nf4"))


def _conflict(message: str, mend: str) -> ConfigError:
    return ConfigError(Fault(kind="config", message=message, mend=mend))


def loading_options(
    kind: str, auto_class: Any, stored: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Arguments of `from_pretrained`; none for weights that stay as they are.

    Quantised weights are made on the device that computes with them: what belongs to a weight beside its values does
    not follow it when weights are divided among ranks. 4-bit values are packed into `dtype`, the type of all other
    weights, which is what ZeRO-3 and FSDP2 can divide.
    """
    already = stored_kind(stored) != "none"
    if kind == "none" and not already:
        return {}
    options: dict[str, Any] = {"device_map": {"": device}}
    if already:
        return options
    spared = head_names(auto_class, stored, trust_remote_code=trust_remote_code)
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=spared)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype, llm_int8_skip_modules=spared)
    return {**options, "quantization_config": config}


def make_ready(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let quantised layers compute in `dtype`. Does nothing where there are none.

    Norms, embeddings and output layers stay in the type they were loaded in: autocast computes with them as it does in
    a model that is not quantised, so float32 copies would only take memory. On CPUs they may lie in the mapped
    checkpoint, all of which has been read to be quantised: a copy lets it go.
    """
    if not is_quantised(model):
        return
    import bitsandbytes

    from peftune.model.int8 import Int8Linear

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            # on CPUs with AVX512-BF16 bitsandbytes would pack the weights anew in evaluation, and train on those
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            Int8Linear.take_over(module)
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def quantise_hollow(
    model: PreTrainedModel, kind: str, auto_class: Any, stored: PreTrainedConfig, *, dtype: torch.dtype,
    trust_remote_code: bool,
) -> None:
    """Give a model on the meta device bitsandbytes' layers, each with the tensors that it has once it is quantised.

    In 8 bits a scale a row; in 4 bits 64 values a scale, the scales in 8 bits, and 256 of those a float32 scale.
    """
    if kind == "none":
        return
    import bitsandbytes
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    from peftune.model.int8 import Int8Linear

    plain = copy.deepcopy(stored)  # as if the checkpoint were not quantised already
    if stored_kind(plain) != "none":
        del plain.quantization_config
    found = loading_options(kind, auto_class, plain, dtype=dtype, device=torch.device("meta"),
                            trust_remote_code=trust_remote_code)["quantization_config"]
    replace_with_bnb_linear(model, found.llm_int8_skip_modules, found)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            shape = module.weight.shape
            module.weight.data = torch.empty(shape.numel() // 2 // dtype.itemsize, 1, dtype=dtype, device="meta")
            module.weight.quant_state = module.quant_state = _four_bit_state(shape, kind, dtype)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.weight = nn.Parameter(torch.empty_like(module.weight, dtype=torch.int8), requires_grad=False)
            module.state.SCB = torch.empty(module.out_features, device="meta")
            Int8Linear.take_over(module)
    model.config.quantization_config = found
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "int8", kind != "int8"
    make_ready(model, dtype)


def _four_bit_state(shape: torch.Size, kind: str, dtype: torch.dtype) -> Any:
    from bitsandbytes.functional import QuantState

    blocks = -(-shape.numel() // BLOCK)
    scales = QuantState(torch.empty(-(-blocks // SCALES_BLOCK), device="meta"), code=torch.empty(256, device="meta"),
                        blocksize=SCALES_BLOCK, dtype=torch.float32)
    return QuantState(torch.empty(blocks, dtype=torch.uint8, device="meta"), shape, torch.empty(16, device="meta"),
                      BLOCK, kind, dtype, offset=torch.empty((), device="meta"), state2=scales)


def quantised_tensors(module: nn.Module) -> list[tuple[Any, str, Tensor]]:
    """What a quantised layer holds beside its weights: (its holder, name of the attribute, tensor)."""
    state = _state_of(module._parameters.get("weight"))
    holders = ([state, state.state2] if state is not None
               else [module.state] if type(module).__name__ == "Int8Linear" else [])
    return [(holder, name, value) for holder in holders for name in ("absmax", "code", "offset", "SCB")
            if isinstance(value := vars(holder).get(name), Tensor)]


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether any layer is."""
    return bool(model.config.to_dict().get("quantization_config"))


def quantised_here(model: PreTrainedModel) -> bool:
    """Whether the model was quantised while it was loaded: its checkpoint is not."""
    return is_quantised(model) and not model.hf_quantizer.pre_quantized


def quantised_by(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of transformers' BitsAndBytesConfig that quantised the model as it was loaded; else none."""
    found = model.config.quantization_config.to_diff_dict() if quantised_here(model) else {}
    return {name: value for name, value in found.items() if not name.startswith("_")}


def _state_of(parameter: Tensor | None) -> Any:
    return getattr(parameter, "quant_state", None)  # of bitsandbytes' 4-bit parameters alone


def values_in(parameter: nn.Parameter) -> int:
    """Weights in a parameter; 4-bit ones are several to a stored value."""
    state = _state_of(parameter)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


@torch.no_grad()
def dequantised_weight(layer: nn.Linear) -> Tensor | None:
    """Values of a bitsandbytes layer that is ready, [out, in] float32, by its own functions; None for other layers."""
    import bitsandbytes

    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        weight: Any = layer.weight
        values: Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        return values.float()
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        assert layer.state.SCB is not None, "the layer is not ready"
        rows: Tensor = bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.data, layer.state.SCB)
        return rows.float()
    return None


@torch.no_grad()
def dequantise(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put plain linear layers with the same values in place of the quantised ones; the model saves as such."""
    for name, module in list(model.named_modules()):
        values = dequantised_weight(module) if isinstance(module, nn.Linear) else None
        if values is None:
            continue
        plain = nn.Linear(values.shape[1], values.shape[0], bias=module.bias is not None, device="meta")
        plain.weight = nn.Parameter(values.to(dtype), requires_grad=False)
        plain.bias = module.bias
        model.set_submodule(name, plain)
    model.hf_quantizer.remove_quantization_config(model)
