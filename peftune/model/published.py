"""What a published folder holds, by the names of the live model."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftune.errors import Fault, ModelError
from peftune.model.beneath import has_beneath, trained_part


def published_weights(model: PreTrainedModel | PeftModel, folder: Path) -> dict[str, Tensor]:
    """The trained weights of a folder that `save_model` has written, by the live model's names.

    Raises:
        ModelError: the folder lacks weights that the model trains.
    """
    live = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = _of_adapter(model, live, folder) if isinstance(model, PeftModel) else _of_whole(model, live, folder)
    missing = sorted(live.keys() - found.keys())
    if missing:
        raise ModelError(Fault(kind="model", file=str(folder), message=f"lacks {len(missing)} trained weights "
                               f"({', '.join(missing[:3])})", mend="the folder was not written by this run"))
    return found


def _of_whole(model: PreTrainedModel, live: dict[str, nn.Parameter], folder: Path) -> dict[str, Tensor]:
    """Read by transformers, which writes some families by other names and in other shapes than they have in memory:
    experts one by one, the output layer by the name that it had first."""
    kept = type(model).from_pretrained(str(folder), dtype=model.dtype, use_safetensors=True)
    return {name: parameter.detach() for name, parameter in kept.named_parameters() if name in live}


def _of_adapter(model: PeftModel, live: dict[str, nn.Parameter], folder: Path) -> dict[str, Tensor]:
    names = _names_in_files(model, live)
    saved = {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}
    found = {names[key]: tensor for key, tensor in saved.items() if key in names}
    return {name: trained_part(tensor, live[name]) for name, tensor in found.items()} if has_beneath(model) else found


def _names_in_files(model: PeftModel, live: dict[str, nn.Parameter]) -> dict[str, str]:
    """Key in the published file -> name in the live model. PEFT leaves the adapter's own name out of its keys."""
    by_identity = {id(parameter): name for name, parameter in live.items()}
    exported = get_peft_model_state_dict(model, state_dict=model.state_dict(keep_vars=True),
                                         save_embedding_layers=False)
    found = {key: by_identity[id(tensor)] for key, tensor in exported.items() if id(tensor) in by_identity}
    if model.active_peft_config.is_prompt_learning:
        prompt = [name for name in live if "prompt_encoder." in name]
        if len(prompt) == 1:
            found["prompt_embeddings"] = prompt[0]
        else:
            found |= {name: name for name in prompt}  # in PROMPT_ENCODER
    return found
