"""A frozen LoRA beneath the one that trains: an earlier adapter, or a start away from zero taken back.

PiSSA (Meng et al., 2024, arXiv:2404.02948) and OLoRA (Büyükakyüz, 2024, arXiv:2406.01775) start from factors A0, B0 of
the weight, W = W_res + s B0 A0, and train W_res + s B A. PEFT writes W_res over W. Here W stays as it is, and -s B0 A0
lies frozen beneath: the same sum, but the adapter still fits the untouched checkpoint, and with it off the model is the
untrained one.

Both products are published as one plain LoRA, [B | B'] [A ; A'].
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from peftune.errors import Fault, ModelError

BENEATH = "beneath"
TRAINED = "default"
PREFIX = "base_model.model."
NO_DDP_SYNC = "_ddp_params_and_buffers_to_ignore"
"""Attribute in which torch's DistributedDataParallel finds names of buffers that it need not send in every pass."""


def has_beneath(model: nn.Module) -> bool:
    """Whether a frozen adapter lies beneath the trained one."""
    return isinstance(model, PeftModel) and BENEATH in model.peft_config


def start_from_factors(model: PeftModel, start: str) -> None:
    """Set the trained factors to those of `start`, and their negative product beneath.

    Args:
        model: with a new, plain LoRA.
        start: pissa, pissa_niter_N or olora.

    Raises:
        ModelError: a target is no linear layer with a floating-point weight.
    """
    config = copy.deepcopy(model.peft_config[TRAINED])
    _add(model, config)
    for name, layer in _layers(model):
        if TRAINED not in layer.lora_A or not isinstance(layer.get_base_layer(), nn.Linear):
            raise _error(f"init_lora_weights={start}: {name} is no linear layer", "leave it out of target_modules")
        weight = layer.get_base_layer().weight
        if not weight.is_floating_point():
            raise _error(f"init_lora_weights={start} takes the factors of {name}, whose weight is quantised",
                         "model.quantization=none, or init_lora_weights=true")
        before = weight.data.clone()
        if start == "olora":
            layer.olora_init(TRAINED)
        else:
            layer.pissa_init(TRAINED, start)
        layer.get_base_layer().weight.data = before
        a, b = layer.lora_A[TRAINED].weight.data.float(), layer.lora_B[TRAINED].weight.data.float()
        layer.lora_A[TRAINED].weight.data, layer.lora_B[TRAINED].weight.data = a, b
        _hold(layer, a.clone(), -b)
    _activate(model)


def put_beneath(model: PeftModel, config: LoraConfig, folder: Path) -> None:
    """Load an earlier, plain LoRA frozen beneath the trained one."""
    _add(model, copy.deepcopy(config))
    found = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"), adapter_name=BENEATH)
    if found.unexpected_keys:
        raise _error(f"{folder} holds weights that do not fit: {', '.join(found.unexpected_keys[:3])}",
                     "the adapter beneath must be a LoRA of the same model")
    for _, layer in _layers(model):
        if BENEATH in layer.lora_A:
            a, b = layer.lora_A[BENEATH].weight.data.float(), layer.lora_B[BENEATH].weight.data.float()
            if TRAINED in layer.lora_A:
                b = b * (layer.scaling[BENEATH] / layer.scaling[TRAINED])
            _hold(layer, a, b)
    _activate(model)


def activate_all(model: PeftModel) -> None:
    """Switch the trained adapter on, and the one beneath it where there is one."""
    model.set_adapter(TRAINED)
    if has_beneath(model):
        _activate(model)


def save_joined(model: PeftModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Write both adapters as one plain LoRA whose rank is the sum of theirs.

    Args:
        model: unwrapped.
        weights: its trained weights and buffers, whole, by name.
        folder: to fill.
    """
    config = copy.deepcopy(model.peft_config[TRAINED])
    state = get_peft_model_state_dict(model, state_dict=dict(weights), adapter_name=TRAINED,
                                      save_embedding_layers=False)
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for name, layer in _layers(model):
        mine, below = (adapter in layer.lora_A for adapter in (TRAINED, BENEATH))
        scale = layer.scaling[TRAINED if mine else BENEATH]
        key_a, key_b = (f"{PREFIX}{name}.{part}.weight" for part in ("lora_A", "lora_B"))
        if below:
            a, b = (weights[f"{PREFIX}{name}.{part}.{BENEATH}.weight"].cpu() for part in ("lora_A", "lora_B"))
            state[key_a] = torch.cat([state[key_a].cpu(), a]) if mine else a
            state[key_b] = torch.cat([state[key_b].cpu(), b], dim=1) if mine else b
        ranks[name], scales[name] = state[key_a].shape[0], scale
    _describe(config, ranks, scales)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "adapter_model.safetensors",
              metadata={"format": "pt"})
    config.inference_mode = True
    mapping = None
    if config.task_type is None:
        base = type(model.get_base_model())
        mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=mapping)


def trained_part(tensor: Tensor, live: Tensor) -> Tensor:
    """The trained factor out of a published, joined one: it comes first."""
    return tensor[tuple(slice(size) for size in live.shape)]


def _describe(config: LoraConfig, ranks: dict[str, int], scales: dict[str, float]) -> None:
    """Rank and alpha of the joined adapter, layer by layer where they differ."""
    config.r = max(ranks.values())
    config.lora_alpha = config.r * next(scale for name, scale in scales.items() if ranks[name] == config.r)
    config.use_rslora = False
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {name: scale * ranks[name] for name, scale in scales.items()
                            if scale * ranks[name] != config.lora_alpha}
    config.target_modules = set(ranks)


def _add(model: PeftModel, config: LoraConfig) -> None:
    config.modules_to_save = config.trainable_token_indices = None
    config.lora_dropout = 0.0
    config.inference_mode = True
    PeftModel.add_adapter(model, BENEATH, config, autocast_adapter_dtype=False)  # its kinds would add a head of its own


def _activate(model: PeftModel) -> None:
    model.base_model.set_adapter([TRAINED, BENEATH])
    # torch's DDP need not send what is equal on all ranks in every forward pass
    setattr(model, NO_DDP_SYNC, [name for name, _ in model.named_buffers() if f".{BENEATH}." in name])


def _hold(layer: LoraLayer, a: Tensor, b: Tensor) -> None:
    """Keep the frozen factors as buffers: every rank holds them whole, whatever divides the weights.

    `b` has the trained adapter's scale, where the layer has one.
    """
    if TRAINED in layer.lora_A:
        layer.scaling[BENEATH] = layer.scaling[TRAINED]
        layer.lora_variant |= {TRAINED: _Joined(), BENEATH: _InJoined()}
    for part, values in ((layer.lora_A[BENEATH], a), (layer.lora_B[BENEATH], b)):
        del part.weight
        part.register_buffer("weight", values)


class _Joined(LoraVariant):
    """Both products as one, exactly as the saved adapter computes them.

    In bfloat16 it matters: a large product and its near opposite, rounded one by one, leave their rounding behind.
    """

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        a, b = (torch.cat([part[TRAINED].weight, part[BENEATH].weight], dim=dim)
                for dim, part in ((0, module.lora_A), (1, module.lora_B)))
        dropout = module.lora_dropout[TRAINED]
        if module.training and isinstance(dropout, nn.Dropout):
            rank = len(module.lora_A[TRAINED].weight)
            inner = torch.cat([F.linear(dropout(x), a[:rank]), F.linear(x, a[rank:])], dim=-1)
        else:
            inner = F.linear(x, a)
        return result + F.linear(inner, b) * module.scaling[TRAINED]


class _InJoined(LoraVariant):
    """What `_Joined` has done already."""

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        return result


def _layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix(PREFIX), module


def _error(message: str, mend: str) -> ModelError:
    return ModelError(Fault(kind="model", message=f"adapter: {message}", mend=mend))
