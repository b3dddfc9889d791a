"""PEFT methods by their own names and fields."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    AdaLoraConfig,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    PromptLearningConfig,
    TaskType,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel

from peftune.config.schema import AdapterConfig
from peftune.errors import ConfigError, Fault, ModelError
from peftune.model.beneath import start_from_factors
from peftune.model.earlier import continued, frozen_beneath
from peftune.model.limits import LIMITS, Asked, takes_factors

TASK_TYPES = {
    "sequence_classification": TaskType.SEQ_CLS, "token_classification": TaskType.TOKEN_CLS,
    "question_answering": TaskType.QUESTION_ANS, "causal_lm": TaskType.CAUSAL_LM, "preference": TaskType.CAUSAL_LM,
}
HEADS = ("classifier", "score", "qa_outputs")
"""Modules to save that PEFT adds for its tasks, whatever the model calls its own."""


def peft_config(
    adapter: AdapterConfig, task: str, new_modules: Sequence[str], *, adds_tokens: bool = False
) -> PeftConfig:
    """The PEFT config of the adapter section, with new modules among those to train and save.

    Args:
        adapter: the config's section.
        task: name of the task.
        new_modules: modules without trained weights; of their like an earlier adapter holds its own.
        adds_tokens: rows of the embeddings are to train for new tokens.

    Raises:
        ConfigError: an unknown method, a field or value that the method does not take, or what cannot work.
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
    asked = Asked(adapter, config_class, values, task, adds_tokens)
    faults += [_fault(f"adapter.{limit.key}: {limit.why}", limit.mend) for limit in LIMITS if limit.broken_by(asked)]
    if faults:
        raise ConfigError(faults)
    task_type: TaskType | None = TASK_TYPES[task]
    if task == "question_answering" and not issubclass(config_class, PromptLearningConfig):
        # peft 0.21: PeftModelForQuestionAnswering drops token_type_ids and position_ids in silence; a plain PeftModel
        # passes them on. Delete this with a peft that does so too
        task_type = None
    if adapter.init_from is not None:
        return continued(adapter.init_from, adapter.method, values, task_type)
    if adapter.stack_on is not None:
        frozen_beneath(adapter.stack_on)
    if "modules_to_save" in known and new_modules:
        values["modules_to_save"] = sorted({*(values.get("modules_to_save") or ()), *new_modules})
    if config_class is AdaLoraConfig:
        values["total_step"] = sys.maxsize  # until the run counts its steps
    if asked.start == "loftq":
        values |= {"init_lora_weights": True, "loftq_config": {}}  # PEFT's own start knows one kind of four bits
    try:
        return config_class(task_type=task_type, **values)
    except (TypeError, ValueError) as error:
        raise ConfigError(_fault(f"adapter: {error}", f"see the fields of peft's {config_class.__name__}")) from None


def _config_class(method: str) -> type[PeftConfig]:
    names = {kind.value.lower(): PEFT_TYPE_TO_CONFIG_MAPPING[kind] for kind in PeftType
             if kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    if method not in names:
        near = difflib.get_close_matches(method, names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(_fault(f"adapter.method = {method!r}: no PEFT method",
                                 f"{hint}peft here has {', '.join(sorted(names))}"))
    return names[method]


def _fault(message: str, mend: str) -> Fault:
    return Fault(kind="config", message=message, mend=mend)


def attach(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Freeze the model and attach a new adapter to it.

    Inputs of adapter layers stay in the type they come in: autocast multiplies in the right one, and PEFT's
    own float32 copies of them are the largest avoidable cost of LoRA on bfloat16 weights.

    Raises:
        ModelError: the targets match nothing, or the method does not suit the model.
    """
    _refuse_absent(model, config)
    start = config.init_lora_weights if isinstance(config, LoraConfig) else None
    if takes_factors(start):
        config.init_lora_weights = True  # PEFT would write into the base weights
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except NoMatchingPeftModuleError as error:
        raise ModelError(Fault(kind="model", message=f"adapter.target_modules: {str(error).split('. ')[0]}",
                               mend=_target_names(model, config))) from None
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        if any(parameter.is_meta for parameter in model.parameters()) and isinstance(error, NotImplementedError):
            raise  # FRoD looks at values: whether it fits can only be seen where there are some
        named = "target_modules" in vars(config)
        also = f", or adapter.target_modules ({_target_names(model, config)})" if named else ""
        raise ModelError(Fault(
            kind="model", message=f"adapter.method = {config.peft_type.value.lower()} does not fit "
            f"{type(model).__name__}: {error}", mend=f"mend the field that it names{also}",
        )) from error
    _refuse_unmatched(adapted, config)
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
    if takes_factors(start):
        start_from_factors(adapted, str(start))
    return adapted


def _refuse_absent(model: PreTrainedModel, config: PeftConfig) -> None:
    """Raise ModelError for names, among targets and modules to save, that no module has: PEFT would take no notice. Of
    targets that are absent one and all it says so itself."""
    names = [f".{name}" for name, _ in model.named_modules()]
    targets = vars(config).get("target_modules") or ()
    targets = [] if isinstance(targets, str) else sorted(targets)
    lacking = [key for key in targets if not any(name.endswith(f".{key}") for name in names)]
    if 0 < len(lacking) < len(targets):
        raise ModelError([Fault(kind="model", message=f"adapter.target_modules: no module is called {key!r}",
                                mend=_target_names(model, config)) for key in lacking])
    leaves = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if [*module.parameters(False)]})
    absent = [key for key in vars(config).get("modules_to_save") or ()
              if key not in HEADS and not any(name.endswith(key) for name in names)]
    if absent:
        raise ModelError([Fault(kind="model", message=f"adapter.modules_to_save: no module is called {key!r}",
                                mend=f"modules with weights here: {', '.join(leaves)}") for key in absent])


def _refuse_unmatched(model: PeftModel, config: PeftConfig) -> None:
    """Raise ModelError where a pattern gives a rank or alpha of its own to no layer: PEFT would take no notice."""
    if vars(config).get("target_parameters"):
        return  # patterns name parameters there
    layers = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    faults = [Fault(kind="model", message=f"adapter.{field}: {key!r} matches no layer that is adapted",
                    mend=f"the end of a layer's name, such as {layers[0].removeprefix('base_model.model.')}")
              for field in ("rank_pattern", "alpha_pattern") for key in vars(config).get(field) or {}
              if layers and all(get_pattern_key([key], name) != key for name in layers)]
    if faults:
        raise ModelError(faults)


def has_adapter(model: nn.Module) -> bool:
    """Whether a PEFT method is attached."""
    return isinstance(model, PeftModel)


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model without its adapter, or itself."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def virtual_tokens(adapter: AdapterConfig | None, task: str, *, adds_tokens: bool = False) -> int:
    """Tokens of the prompt that is to be learned: they lie before each text, and take positions of the model.

    Raises:
        ConfigError: see `peft_config`.
    """
    return 0 if adapter is None else _virtual_tokens(peft_config(adapter, task, (), adds_tokens=adds_tokens))


def virtual_tokens_of(model: nn.Module) -> int:
    """The same of a model in memory."""
    return _virtual_tokens(model.active_peft_config) if isinstance(model, PeftModel) else 0


def trains_base_biases(config: PeftConfig) -> bool:
    """Whether biases of the base train beside the adapter. PEFT attaches no second adapter of that kind."""
    return vars(config).get("bias", "none") != "none"


def _virtual_tokens(config: PeftConfig) -> int:
    return config.num_virtual_tokens or 0 if isinstance(config, PromptLearningConfig) else 0


def learns_prompt(model: nn.Module) -> bool:
    """Whether the adapter is a prompt in front of the text, or in the attention's cache."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def _target_names(model: nn.Module, config: PeftConfig) -> str:
    norms = isinstance(config, LNTuningConfig)
    leaves = sorted({name.rpartition(".")[2] for name, module in model.named_modules()
                     if ("Norm" in type(module).__name__ if norms else isinstance(module, nn.Linear))})
    targets = getattr(config, "target_modules", None) or ()  # not every method has targets
    wanted = [targets] if isinstance(targets, str) else list(targets)
    near = [match for name in wanted if name not in leaves for match in difflib.get_close_matches(name, leaves, n=1)]
    hint = f"did you mean {', '.join(dict.fromkeys(near))}? " if near else ""
    if isinstance(targets, str) and targets in leaves:
        hint = f"[{targets}], as a list: a text is a pattern of whole names; "
    kind, all_of_them = ("norms", "") if norms else ("linear layers", "; or all-linear")
    return f"{hint}{kind} here: {', '.join(leaves)}{all_of_them}"
