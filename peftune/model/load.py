"""Weights -> a model in memory, with the output layer that the task needs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.hub_kernels import is_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
    is_kernels_available,
)

from peftune.config.schema import ModelConfig
from peftune.errors import ConfigError, Fault, MachineError, ModelError
from peftune.model.download import Tell, bar_that_tells
from peftune.model.foreign import reading
from peftune.model.heads import head_for
from peftune.model.quantize import loading_options, make_ready
from peftune.model.resolve import load_model_config

PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
"""Our names of a classifier's problem -> transformers' `config.problem_type`."""
ROBERTA_S_KIND = frozenset({"camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke",
                            "markuplm", "mpnet", "xmod"})
"""Families by `model_type` that count positions from the padding id, as RoBERTa does."""
FLASH = {"flash_attention_2": (is_flash_attn_2_available, "flash-attn"),
         "flash_attention_3": (is_flash_attn_3_available, "flash-attn-3"),
         "flash_attention_4": (is_flash_attn_4_available, "flash-attn-4")}
"""Attention that comes in a package of its own: whether it is here, and its name."""
MOST_TOKENS = 1 << 30
"""What a model without a table of positions is taken to read."""
INITIAL_SPREAD = 0.02
"""Standard deviation of a new output layer's weights where the model's config names none: transformers' own."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and what its checkpoint did not hold."""

    model: PreTrainedModel
    new_modules: tuple[str, ...]
    """Modules with newly initialised weights, the head among them; always trained and saved."""

    def head(self, wanted: bool) -> tuple[str, ...]:
        """Modules outside the body that hold weights, if they are wanted: a head that was trained before trains on."""
        names = ((name, any(True for _ in module.parameters())) for name, module in self.model.named_children())
        return tuple(name for name, has in names if wanted and has and name != self.model.base_model_prefix)


def adjust_config(
    config: PreTrainedConfig, *, dropout: float | None, problem: str, names: tuple[str, ...],
    pad_id: int | None,
) -> PreTrainedConfig:
    """Write the classes, the padding token and the dropout rate into a model's config.

    Args:
        config: changed in place and returned.
        dropout: rate for every dropout field the config has; None keeps them.
        problem: what the task predicts, see `Targets.problem`.
        names: class names in the order of the outputs.
        pad_id: id of the padding token.
    """
    if dropout is not None:
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, dropout)
    if "use_cache" in config.to_dict():
        config.use_cache = False  # of no use in a whole forward pass; generation asks for its cache itself
    config.get_text_config().pad_token_id = pad_id
    config.pad_token_id = pad_id
    if problem in PROBLEM_TYPES:
        config.problem_type = PROBLEM_TYPES[problem]
    if problem == "regression":
        config.num_labels = 1
    if problem in ("answer", "answer_or_none"):
        config.num_labels = 2  # a score as first and one as last token
    if names:
        config.num_labels = len(names)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: k for k, name in enumerate(names)}
    return config


def require_attention(name: str) -> None:
    """Raise ConfigError where transformers has no attention of this name, MachineError where its package is missing."""
    known = ("auto", "eager", *sorted(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if key.isidentifier()))
    if name not in known and not is_kernel(name):
        raise ConfigError(Fault(kind="config", message=f"model.attention = {name!r} is none that transformers has",
                                mend="model.attention=auto, or one of " + ", ".join(known[1:])))
    available, package = FLASH.get(name, (lambda: not is_kernel(name), "kernels"))
    if not available() and not is_kernels_available():  # from where transformers takes what is missing
        raise MachineError(Fault(kind="environment", message=f"model.attention = {name!r} needs {package} and a GPU "
                                 "that it knows", mend=f"model.attention=auto, or pip install {package}"))


def load_weights(
    config: ModelConfig, source: str, model_config: PreTrainedConfig, auto_class: Any, *, dtype: torch.dtype,
    new_head: bool, device: torch.device, tell: Tell | None = None,
) -> Loaded:
    """Load the checkpoint's weights into the task's architecture: on the CPU, or quantised on `device`.

    Args:
        config: the model section.
        source: folder or hub id, from `resolve`.
        model_config: the adjusted config.
        auto_class: a transformers Auto class.
        dtype: of the weights.
        new_head: whether the task may have an output layer that the checkpoint lacks.
        device: that computes.
        tell: told of a download.

    Raises:
        ModelError: no weights, an architecture without such a head, weights of the body missing, or a head that was
            trained for the same classes in another order.
    """
    attention = None if config.attention == "auto" else config.attention

    def unreadable(reason: str) -> ModelError:
        other = attention is not None and re.search("attention|attn", reason, re.IGNORECASE)
        return ModelError(Fault(
            kind="model", message=f"the weights of {config.name_or_path} cannot be loaded: {reason}",
            mend="model.attention=auto" if other else
            "give a folder or hub id with safetensors weights of an architecture that fits the task"))

    with reading(unreadable):
        model, info = head_for(auto_class, model_config).from_pretrained(
            source, config=model_config, revision=config.revision, dtype=dtype, attn_implementation=attention,
            trust_remote_code=config.trust_remote_code, output_loading_info=True, ignore_mismatched_sizes=new_head,
            use_safetensors=True, **({} if tell is None else {"tqdm_class": bar_that_tells(tell)}),
            **loading_options(config.quantization, auto_class, model_config, dtype=dtype, device=device,
                              trust_remote_code=config.trust_remote_code),
        )
        make_ready(model, dtype)
    fresh = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    body = [key for key in fresh if not new_head or _in_body(model, key)]
    if body:
        raise ModelError(Fault(
            kind="model", message=f"the checkpoint of {config.name_or_path} lacks {len(body)} weights of the model "
            f"itself ({', '.join(body[:3])}{', ...' if len(body) > 3 else ''})",
            mend="training would start from noise there: give a whole checkpoint",
        ))
    if new_head:
        fresh += _forget_other_classes(model, fresh, config, _names(load_model_config(config, source)))
    return Loaded(model, tuple(sorted({_owner(model, key) for key in fresh})))


def _names(config: PreTrainedConfig) -> list[str]:
    """Of the classes, in the order of the outputs."""
    return [config.id2label[k] for k in sorted(config.id2label)]


@torch.no_grad()
def _forget_other_classes(
    model: PreTrainedModel, fresh: list[str], config: ModelConfig, theirs: list[str]
) -> list[str]:
    """Make the output layer new if the checkpoint's was trained for other classes, as one of another size is.

    Returns:
        The names of its weights; none where it is kept or new already.

    Raises:
        ModelError: it was trained for the same classes in another order, or cannot be told from the other layers.
    """
    mine = _names(model.config)
    unnamed = [f"LABEL_{k}" for k in range(len(theirs))], [str(k) for k in range(len(theirs))]
    if theirs == mine or sorted(theirs) == sorted(unnamed[0]) or mine == unnamed[1]:
        return []
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)
              and not _in_body(model, f"{name}.") and layer.out_features == len(mine)}
    name, layer = next(reversed(layers.items()), ("", None))
    if f"{name}.weight" in fresh or (layer is None and fresh):
        return []
    if layer is None or sorted(theirs) == sorted(mine):
        raise ModelError(Fault(
            kind="model", message=f"model.name_or_path: the output layer of {config.name_or_path} was trained for the "
            f"classes {theirs[:8]}, not {mine[:8]}",
            mend=f"data.labels={json.dumps(theirs, ensure_ascii=False)}, the checkpoint's classes in their order"))
    spread = model.config.to_dict().get("initializer_range") or INITIAL_SPREAD
    nn.init.normal_(layer.weight, std=spread)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return [f"{name}.{key}" for key, _ in layer.named_parameters()]


def _in_body(model: PreTrainedModel, key: str) -> bool:
    return key.startswith(model.base_model_prefix + ".") and "pooler" not in key


def _owner(model: PreTrainedModel, key: str) -> str:
    """The module to train for a fresh weight: the whole head, or the layer inside the body."""
    head = key.split(".")[0]
    return key.rpartition(".")[0] if head == model.base_model_prefix else head


def longest_input(model_config: PreTrainedConfig, wanted: int, virtual_tokens: int = 0) -> int:
    """Tokens an example may have: `wanted`, or the size of a learned position table where that is smaller.

    Rotary models have no such table. In it a learned prompt of so many virtual tokens takes positions too.
    """
    text = model_config.get_text_config()
    rows = getattr(text, "max_position_embeddings", None) or -1  # families without positions lack it, or say -1
    if rows < 1 or getattr(text, "rope_parameters", None) is not None:  # families without rotation lack it
        return wanted
    return min(wanted, rows - first_position(model_config) - virtual_tokens)


def first_position(model_config: PreTrainedConfig) -> int:
    """Position id of the first token: 0, but after the padding id for RoBERTa's kind, which lose those rows."""
    text = model_config.get_text_config()
    counts_from_padding = "roberta" in text.model_type or text.model_type in ROBERTA_S_KIND
    return text.pad_token_id + 1 if counts_from_padding else 0


def local_source(name: str) -> str:
    """An absolute path for a folder, so that a saved adapter finds its base from anywhere; a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name
