"""Trained weights <-> plain peft or transformers folders."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from peftune.errors import Fault, ModelError
from peftune.model.adapters import BaseTunerLayer, base_of, trains_base_biases, virtual_tokens_of
from peftune.model.beneath import TRAINED, activate_all, has_beneath, save_joined
from peftune.model.folder import ADAPTER, own_config
from peftune.model.foreign import reading
from peftune.model.heads import head_for
from peftune.model.load import longest_input
from peftune.model.outputs import logits_of
from peftune.model.quantize import dequantise, is_quantised, loading_options, make_ready, quantised_here

CPU = torch.device("cpu")
CHECK_NAME = "reloaded"
PROMPT_ENCODER = "prompt_encoder.safetensors"
"""The network that makes a learned prompt. PEFT saves the prompt alone, which is all that inference needs."""
PUBLISHED_LIMIT_TOKENS = 1 << 17
"""model_max_length of the saved tokenizer where the model itself has no smaller limit."""


def save_model(
    model: PreTrainedModel | PeftModel, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path,
    *, with_config: bool,
) -> None:
    """Write what was trained, the model's config with its classes, and the tokenizer with its chat template.

    Args:
        model: unwrapped.
        weights: its trained weights and buffers, whole, by name.
        tokenizer: saved beside them.
        folder: to fill.
        with_config: the model's config lies beside an adapter too, see `needs_config`.
    """
    base = base_of(model)
    base.config.architectures = [type(base).__name__]
    with _as_published(base, tokenizer, virtual_tokens_of(model)):
        if isinstance(model, PeftModel):
            _save_adapter(model, weights, folder)
        else:
            model.save_pretrained(str(folder), state_dict=weights)
        if with_config:
            base.config.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))


def _save_adapter(model: PeftModel, weights: dict[str, Tensor], folder: Path) -> None:
    if has_beneath(model):
        save_joined(model, weights, folder)
        return
    # without the tables beneath adapted embeddings: they are the checkpoint's, and divided among ranks nobody has them
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    encoder = {name: tensor for name, tensor in weights.items() if "prompt_encoder." in name}
    if len(encoder) > 1:
        save_file({name: tensor.contiguous() for name, tensor in encoder.items()}, folder / PROMPT_ENCODER)


@contextmanager
def _as_published(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> Iterator[None]:
    """The settings that training changes for itself, set for the folder's later users."""
    config, quantised = base.config, quantised_here(base)
    if quantised:  # true of the weights in memory, not of the checkpoint that the folder's users will load
        in_memory = config.quantization_config
        del config.quantization_config
    limit = tokenizer.model_max_length
    tokenizer.model_max_length = longest_input(config, PUBLISHED_LIMIT_TOKENS, prompt_tokens)
    cached = config.to_dict().get("use_cache")
    if cached is not None:
        config.use_cache = True
    yield
    tokenizer.model_max_length = limit
    if cached is not None:
        config.use_cache = cached
    if quantised:
        config.quantization_config = in_memory


def load_trained(
    folder: Path | str, auto_class: Any, *, dtype: torch.dtype, trust_remote_code: bool = False,
    quantization: str = "none", device: torch.device = CPU, dequantised: bool = False, revision: str | None = None,
) -> PreTrainedModel | PeftModel:
    """Load a folder that `save_model`, peft or transformers has written, adapter or whole model; or a hub id.

    Args:
        folder: or hub id.
        auto_class: a transformers Auto class.
        dtype: of frozen weights and of products with them.
        trust_remote_code: whether the model brings code of its own.
        quantization: as `model.quantization` of the run that trained the adapter.
        device: where quantised weights are made; others are loaded on the CPU.
        dequantised: put plain layers with the values of the quantised ones in their place, float32.
        revision: of a hub id; an adapter names that of its base itself.

    Raises:
        ModelError: the folder, or the base model its adapter names, cannot be loaded.
    """

    def unreadable(reason: str) -> ModelError:
        return ModelError(Fault(kind="model", file=str(folder), message=f"cannot be loaded: {reason}",
                                mend="give a run folder, or one that save_pretrained has written"))

    load = functools.partial(_base, auto_class=auto_class, dtype=dtype, trust_remote_code=trust_remote_code,
                             quantization=quantization, device=device, dequantised=dequantised)
    with reading(unreadable):
        config = own_config(str(folder), revision=revision, trust_remote_code=trust_remote_code)
        if not (Path(folder) / ADAPTER).is_file():
            return load(str(folder), revision, config)
        adapter = PeftConfig.from_pretrained(str(folder))
        text, base_name = config.get_text_config(), adapter.base_model_name_or_path
        rows = text.vocab_size
        text.vocab_size = own_config(base_name, revision=adapter.revision,
                                     trust_remote_code=trust_remote_code).get_text_config().vocab_size
        base = load(base_name, adapter.revision, config)
        if rows > text.vocab_size:
            base.resize_token_embeddings(rows, mean_resizing=False)  # the adapter holds the new rows
        adapted = PeftModel.from_pretrained(
            base, str(folder), is_trainable=not adapter.is_prompt_learning, autocast_adapter_dtype=False)
        _load_wide(adapted, Path(folder), "default")
    return adapted.requires_grad_(False)


def _base(
    name: str, revision: str | None, config: PreTrainedConfig, *, auto_class: Any, dtype: torch.dtype,
    trust_remote_code: bool, quantization: str, device: torch.device, dequantised: bool,
) -> PreTrainedModel:
    model: PreTrainedModel = head_for(auto_class, config).from_pretrained(
        name, revision=revision, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code,
        **loading_options(quantization, auto_class, config, dtype=dtype, device=device,
                          trust_remote_code=trust_remote_code))
    make_ready(model, dtype)
    if dequantised and is_quantised(model):
        dequantise(model, torch.float32)
    return model


def _load_wide(model: PeftModel, folder: Path, name: str) -> None:
    """Load an adapter's weights in the type they were saved in: PEFT would round them to the base model's.

    Only trainable ones are widened, so all of an adapter but learned prompts, which PEFT refuses to load as such.
    """
    state = load_file(folder / "adapter_model.safetensors")
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())  # FRoD keeps places too
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    set_peft_model_state_dict(model, state, adapter_name=name)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


@torch.no_grad()
def live_logits(
    model: PreTrainedModel | PeftModel, inputs: dict[str, Tensor], *,
    autocast: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """Logits of the model as it is, without dropout, float32."""
    was_training = model.training
    model.eval()
    with autocast():
        logits = logits_of(model, inputs).float()
    model.train(was_training)
    return logits


@torch.no_grad()
def reload_deviation(
    model: PreTrainedModel | PeftModel, folder: Path, inputs: dict[str, Tensor], live: Tensor, auto_class: Any, *,
    autocast: Callable[[torch.device], AbstractContextManager[None]], trust_remote_code: bool, divided: bool,
    quantization: str,
) -> float:
    """Largest absolute difference between the live model's logits and those of what `folder` loads to.

    An adapter is loaded a second time beside the live one, through peft, on the same frozen weights; a whole model is
    loaded through transformers. Where no rank holds those weights whole, `folder` is loaded with its base in host
    memory; where the adapter trains biases of its base, with a base of its own.

    Args:
        model: unwrapped.
        folder: what `save_model` has written.
        inputs: of some examples.
        live: the model's logits for them.
        auto_class: the transformers Auto class.
        autocast: precision of forward passes, by device.
        trust_remote_code: whether the model brings code of its own.
        divided: the live model's weights are divided among the ranks.
        quantization: as `model.quantization`.
    """
    if isinstance(model, PeftModel) and not divided and not trains_base_biases(model.active_peft_config):
        was_training = model.training
        model.eval()
        with autocast(live.device):
            saved = _logits_of_second_adapter(model, folder, inputs)
        model.train(was_training)
        return (live - saved).abs().max().item()
    device = torch.device("cpu") if divided else live.device
    other = load_trained(folder, auto_class, dtype=model.dtype, trust_remote_code=trust_remote_code,
                         quantization=quantization, device=device).to(device).eval()
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    with autocast(device):
        saved = logits_of(other, there).float()
    return (live.to(device) - saved).abs().max().item()


def _logits_of_second_adapter(model: PeftModel, folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    config, trainable = model.active_peft_config, [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    config.inference_mode = True  # AdaLoRA allows one trainable adapter
    try:
        model.load_adapter(str(folder), CHECK_NAME, is_trainable=not config.is_prompt_learning,
                           autocast_adapter_dtype=False)
        model.set_adapter(CHECK_NAME)
        _load_wide(model, folder, CHECK_NAME)
        model.eval()  # the new adapter's dropout begins in training mode
        return logits_of(model, inputs).float()
    finally:
        config.inference_mode = False
        model.set_adapter(TRAINED)
        model.delete_adapter(CHECK_NAME)
        activate_all(model)
        for parameter in trainable:
            parameter.requires_grad_(True)
