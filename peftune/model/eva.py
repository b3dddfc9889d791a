"""EVA: LoRA's A from the directions in which the data vary, and ranks by how much of it they explain.

Source: Paischer et al., 2024, arXiv:2410.07170, by PEFT's own implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from peftune.errors import ConfigError, Fault

Inputs = dict[str, Any]


def reads_data(model: nn.Module) -> bool:
    """Whether the adapter waits for data to start from."""
    if not isinstance(model, PeftModel):
        return False
    config = model.active_peft_config
    return isinstance(config, LoraConfig) and config.init_lora_weights == "eva"


@torch.no_grad()
def start_from_data(
    model: Any, batches: Sequence[Inputs], *, autocast: Callable[[], AbstractContextManager[None]]
) -> None:
    """Set A to the leading directions of each layer's inputs, with B zero; ranks may move between layers.

    The same batches give the same start, whatever the number of ranks: each computes it by itself.

    Args:
        model: a PeftModel with a new LoRA.
        batches: padded inputs, from planned training examples; read again and again until the directions settle.
        autocast: precision of the forward passes.

    Raises:
        ConfigError: a layer sees fewer rows in each batch than directions are looked for: they could never be found.
    """
    config = model.active_peft_config
    needed = round(max([config.r, *config.rank_pattern.values()]) * config.eva_config.rho)
    was_training = model.training
    model.eval()
    with autocast():
        fewest = [_fewest_rows(model, inputs) for inputs in batches]
        usable = [inputs for inputs, (rows, _) in zip(batches, fewest, strict=True) if rows >= needed]
        if not usable:
            rows, name = max(fewest)
            raise ConfigError(Fault(
                kind="config", message=f"adapter.init_lora_weights=eva looks for {needed} directions (r times "
                f"eva_config.rho), and {name} sees at most {rows} rows at once",
                mend="a smaller adapter.r, a larger train.batch_size, or name the layer in adapter.exclude_modules"))
        initialize_lora_eva_weights(model, usable, prepare_layer_inputs_fn=_real_rows, gather_distributed_inputs=False,
                                    show_progress_bar=False)
    model.train(was_training)
    config.init_lora_weights, config.eva_config = True, None  # done: loading it again must not wait for data


def _fewest_rows(model: nn.Module, inputs: Inputs) -> tuple[int, str]:
    """Of all adapted layers, the one that sees the fewest rows of this batch."""
    seen: dict[str, int] = {}
    real = int(inputs["attention_mask"].sum())

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = real if args[0].ndim > 2 else len(args[0])

        return hook

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in model.named_modules()
             if isinstance(module, LoraLayer)]
    try:
        model(**inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return min((rows, name) for name, rows in seen.items())


def _real_rows(layer_input: tuple[Tensor, ...], real: Tensor, name: str) -> Tensor:
    """Inputs of a layer without those of padding, [rows, features]; a pooled layer has one row an example.

    `real`: rows and columns of tokens that are not padding, [tokens, 2], from PEFT.
    """
    values = layer_input[0]
    return values[real.T.unbind()] if values.ndim == 3 else values.reshape(-1, values.shape[-1]).contiguous()
