"""Trained weights <-> plain peft or transformers folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from peftune.errors import Fault, ModelError
from peftune.model.adapters import BaseTunerLayer
from peftune.model.load import longest_input
from peftune.model.outputs import logits_of

ADAPTER = "adapter_config.json"
CHECK_NAME = "reloaded"
PUBLISHED_LIMIT_TOKENS = 1 << 17
"""model_max_length of the saved tokenizer where the model itself has no smaller limit."""


def save_model(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write what was trained, the model's config with its classes, and the tokenizer with its chat template."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.config.architectures = [type(base).__name__]
    with _as_published(base.config, tokenizer):
        model.save_pretrained(str(folder))
        base.config.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))


@contextmanager
def _as_published(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """The settings that training changes for itself, set for the folder's later users."""
    limit, tokenizer.model_max_length = tokenizer.model_max_length, longest_input(config, PUBLISHED_LIMIT_TOKENS)
    cached = config.to_dict().get("use_cache")
    if cached is not None:
        config.use_cache = True
    yield
    tokenizer.model_max_length = limit
    if cached is not None:
        config.use_cache = cached


def load_trained(
    folder: Path | str, auto_class: Any, *, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel | PeftModel:
    """Load a folder that `save_model`, peft or transformers has written, adapter or whole model; or a hub id.

    Raises:
        ModelError: the folder, or the base model its adapter names, cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        if not (Path(folder) / ADAPTER).is_file():
            return auto_class.from_pretrained(
                str(folder), config=config, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code)
        adapter = PeftConfig.from_pretrained(str(folder))
        base_name = adapter.base_model_name_or_path
        base = auto_class.from_pretrained(
            base_name, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code)
        adapted = PeftModel.from_pretrained(
            base, str(folder), is_trainable=not adapter.is_prompt_learning, autocast_adapter_dtype=False)
        _load_wide(adapted, Path(folder), "default")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise ModelError(Fault(kind="model", file=str(folder), message=f"cannot be loaded: {reason}",
                               mend="give a run folder, or one that save_pretrained has written")) from error
    return adapted.requires_grad_(False)


def _load_wide(model: PeftModel, folder: Path, name: str) -> None:
    """Load an adapter's weights in the type they were saved in: PEFT would round them to the base model's.

    Only trainable ones are widened, so all of an adapter but learned prompts, which PEFT refuses to load as such.
    """
    state = load_file(folder / "adapter_model.safetensors")
    dtype = next(iter(state.values())).dtype
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    set_peft_model_state_dict(model, state, adapter_name=name)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


@torch.no_grad()
def reload_deviation(
    model: PreTrainedModel | PeftModel, folder: Path, inputs: dict[str, Tensor], auto_class: Any, *,
    autocast: Callable[[], AbstractContextManager[None]], trust_remote_code: bool,
) -> float:
    """Largest absolute difference of logits between the live model and what `folder` loads to.

    An adapter is loaded a second time beside the live one, through peft, on the same frozen weights;
    a whole model is loaded through transformers.
    """
    was_training = model.training
    model.eval()
    with autocast():
        live = logits_of(model, inputs).float()
        if isinstance(model, PeftModel):
            saved = _logits_of_second_adapter(model, folder, inputs)
        else:
            other = load_trained(folder, auto_class, dtype=model.dtype, trust_remote_code=trust_remote_code)
            saved = logits_of(other.to(live.device).eval(), inputs).float()
    model.train(was_training)
    return (live - saved).abs().max().item()


def _logits_of_second_adapter(model: PeftModel, folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    name, trainable = model.active_adapter, [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    model.load_adapter(str(folder), CHECK_NAME, is_trainable=not model.peft_config[name].is_prompt_learning,
                       autocast_adapter_dtype=False)
    try:
        model.set_adapter(CHECK_NAME)
        _load_wide(model, folder, CHECK_NAME)
        model.eval()  # the new adapter's dropout begins in training mode
        return logits_of(model, inputs).float()
    finally:
        model.set_adapter(name)
        model.delete_adapter(CHECK_NAME)
        for parameter in trainable:
            parameter.requires_grad_(True)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors by name, as they lie in the model."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trainable_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy tensors saved from `trainable_state` back. Raises KeyError where names or shapes differ."""
    live = trainable_state(model)
    if live.keys() != state.keys():
        raise KeyError(f"trainable weights differ: {sorted(live.keys() ^ state.keys())[:3]}")
    for name, tensor in state.items():
        live[name].copy_(tensor)


def load_published(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Put the weights of a folder that `save_model` has written back into the live model.

    Raises:
        ModelError: the folder lacks weights that the model trains.
    """
    if isinstance(model, PeftModel):
        state = load_file(folder / "adapter_model.safetensors")
        missing = [key for key in set_peft_model_state_dict(model, state).missing_keys
                   if any(key == name for name, p in model.named_parameters() if p.requires_grad)]
    else:
        files = sorted(folder.glob("*.safetensors"))
        state = {name: tensor for file in files for name, tensor in load_file(file).items()}
        absent = set(model.load_state_dict(state, strict=False).missing_keys)
        missing = sorted(absent & {name for name, _ in model.named_parameters()})
    if missing:
        raise ModelError(Fault(kind="model", file=str(folder), message=f"lacks {len(missing)} trained weights "
                               f"({', '.join(missing[:3])})", mend="the folder was not written by this run"))
