"""Which Auto class carries a task's output layer for a family of models."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from peftune.errors import Fault, ModelError


def head_for(auto_class: Any, config: PreTrainedConfig) -> Any:
    """`auto_class`; or, where a family that reads images too has its next-token layer under another one, that one."""
    if (auto_class is AutoModelForCausalLM and not _has(auto_class, config) and not config.is_encoder_decoder
            and _has(AutoModelForImageTextToText, config)):
        return AutoModelForImageTextToText
    return auto_class


def require_head(auto_class: Any, config: PreTrainedConfig, task: str) -> None:
    """Raise ModelError where transformers has no such output layer for a family. Code of its own may bring one."""
    if not _has(head_for(auto_class, config), config) and "auto_map" not in config.to_dict():
        raise ModelError(Fault(
            kind="model", message=f"model.name_or_path: transformers has no output layer for {task} on models of the "
            f"family {config.model_type}", mend="a model of another family, or a task that this one is made for"))


def _has(auto_class: Any, config: PreTrainedConfig) -> bool:
    return type(config) in auto_class._model_mapping
