"""PEFT methods by their own names and fields."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PeftConfig,
    PeftModel,
    PeftType,
    PromptLearningConfig,
    TaskType,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import PreTrainedModel

from peftune.config.schema import AdapterConfig
from peftune.errors import ConfigError, Fault, ModelError

TASK_TYPES = {
    "sequence_classification": TaskType.SEQ_CLS, "token_classification": TaskType.TOKEN_CLS,
    "question_answering": TaskType.QUESTION_ANS, "causal_lm": TaskType.CAUSAL_LM, "preference": TaskType.CAUSAL_LM,
}


def peft_config(adapter: AdapterConfig, task: str, new_modules: Sequence[str]) -> PeftConfig:
    """The PEFT config of the adapter section, with new modules among those to train and save.

    Raises:
        ConfigError: an unknown method, or a field or value that the method does not take.
    """
    config_class = _config_class(adapter.method)
    known = {field.name for field in fields(config_class)}
    values: dict[str, Any] = dict(adapter.fields)
    faults = []
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2)
            mend = f"did you mean adapter.{' or adapter.'.join(near)}?" if near else f"{config_class.__name__} has none"
            faults.append(_fault(f"adapter.{key}: no field of {config_class.__name__}", mend))
    if faults:
        raise ConfigError(faults)
    if "modules_to_save" in known and new_modules:
        values["modules_to_save"] = sorted({*(values.get("modules_to_save") or ()), *new_modules})
    task_type: TaskType | None = TASK_TYPES[task]
    if task == "question_answering" and not issubclass(config_class, PromptLearningConfig):
        # peft 0.21: PeftModelForQuestionAnswering drops token_type_ids and position_ids in silence; a plain PeftModel
        # passes them on. Delete this with a peft that does so too
        task_type = None
    try:
        return config_class(task_type=task_type, **values)
    except (TypeError, ValueError) as error:
        raise ConfigError(_fault(f"adapter: {error}", f"see the fields of peft's {config_class.__name__}")) from None


def _config_class(method: str) -> type[PeftConfig]:
    names = {kind.value.lower(): PEFT_TYPE_TO_CONFIG_MAPPING[kind] for kind in PeftType
             if kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    if method.lower() not in names:
        near = difflib.get_close_matches(method.lower(), names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(_fault(f"adapter.method = {method!r}: no PEFT method",
                                 f"{hint}peft here has {', '.join(sorted(names))}"))
    return names[method.lower()]


def _fault(message: str, mend: str) -> Fault:
    return Fault(kind="config", message=message, mend=mend)


def attach(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Freeze the model and attach a new adapter to it.

    Inputs of adapter layers stay in the type they come in: autocast multiplies in the right one, and PEFT's
    own float32 copies of them are the largest avoidable cost of LoRA on bfloat16 weights.

    Raises:
        ModelError: the targets match nothing, or the method does not suit the model.
    """
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except NoMatchingPeftModuleError as error:
        raise ModelError(Fault(kind="model", message=f"adapter.target_modules: {str(error).split('. ')[0]}",
                               mend=_target_names(model, config))) from None
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise ModelError(Fault(
            kind="model", message=f"adapter.method = {config.peft_type.value.lower()} does not fit "
            f"{type(model).__name__}: {error}", mend="set adapter.target_modules, or use adapter.method=lora",
        )) from error
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
    return adapted


def has_adapter(model: nn.Module) -> bool:
    """Whether a PEFT method is attached."""
    return isinstance(model, PeftModel)


def _target_names(model: nn.Module, config: PeftConfig) -> str:
    leaves = sorted({name.rpartition(".")[2] for name, module in model.named_modules()
                     if isinstance(module, nn.Linear)})
    targets = getattr(config, "target_modules", None) or ()  # not every method has targets
    wanted = [targets] if isinstance(targets, str) else list(targets)
    near = [match for name in wanted for match in difflib.get_close_matches(name, leaves, n=1)]
    hint = f"did you mean {', '.join(dict.fromkeys(near))}? " if near else ""
    return f"{hint}linear layers here: {', '.join(leaves)}; or all-linear"
