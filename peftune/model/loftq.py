"""A LoRA that starts from what quantisation has rounded away (LoftQ).

Source: Li et al., 2023, arXiv:2310.08659, algorithm 1 with one step: Q = quantised W, then B A = the best rank r of
W - Q. Further steps would choose another Q, and the adapter would fit no base that others can quantise for themselves.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from peftune.config.schema import ModelConfig
from peftune.errors import Fault, ModelError
from peftune.model.load import load_weights
from peftune.model.quantize import dequantised_weight, quantised_here

ADAPTER = "default"


def whole_weights(
    model: ModelConfig, source: str, model_config: PreTrainedConfig, auto_class: Any, quantised: PreTrainedModel, *,
    dtype: torch.dtype, new_head: bool,
) -> PreTrainedModel:
    """The checkpoint before it was quantised, on the CPU: for a moment its bytes lie beside the quantised ones.

    Raises:
        ModelError: the checkpoint's own files are quantised.
    """
    if not quantised_here(quantised):
        raise ModelError(Fault(
            kind="model", message=f"adapter.init_lora_weights = loftq: the files of {model.name_or_path} are "
            "quantised, and what was rounded away is not in them",
            mend="the checkpoint before it was quantised, or adapter.init_lora_weights=true"))
    config = copy.deepcopy(model_config)
    if "quantization_config" in config.to_dict():
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):  # a new head draws numbers, which are the run's to draw
        return load_weights(model.model_copy(update={"quantization": "none"}), source, config, auto_class, dtype=dtype,
                            new_head=new_head, device=torch.device("cpu")).model


@torch.no_grad()
def start_from_rounding(adapted: PeftModel, whole: PreTrainedModel) -> None:
    """Set A and B of each quantised layer so that the sum is as near to the whole weight as rank r allows.

    Args:
        adapted: with a new LoRA; layers that are not quantised keep their start.
        whole: the same architecture, not quantised.
    """
    wholes = dict(whole.named_modules())
    for name, layer in adapted.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or ADAPTER not in layer.lora_A:
            continue
        base: Any = layer.get_base_layer()
        values = dequantised_weight(base) if isinstance(base, nn.Linear) else None
        if values is not None:
            weight: Tensor = wholes[name].weight.data
            a, b = _factors(weight.to(values.device).float() - values, layer.r[ADAPTER], layer.scaling[ADAPTER])
            layer.lora_A[ADAPTER].weight.data, layer.lora_B[ADAPTER].weight.data = a, b


def _factors(residual: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] with scale B A the nearest to the residual [out, in] (Eckart and Young, 1936)."""
    u, s, vh = torch.linalg.svd(residual, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()
