"""A config of LLaMA-Factory or Axolotl as one of ours. What has no counterpart is named, never dropped in silence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftune.config.document import Document, read
from peftune.config.load import validate
from peftune.config.names import FAMILIAR
from peftune.errors import ConfigError, Fault, faults_of
from peftune.starter.foreign_data import axolotl_data, llamafactory_data

SHARED = {
    "output_dir": "output_dir", "seed": "seed", "trust_remote_code": "model.trust_remote_code",
    "gradient_checkpointing": "model.gradient_checkpointing", "lora_alpha": "adapter.lora_alpha",
    "lora_dropout": "adapter.lora_dropout", "learning_rate": "train.learning_rate", "max_steps": "train.max_steps",
    "warmup_ratio": "train.warmup_ratio", "weight_decay": "train.weight_decay", "max_grad_norm": "train.max_grad_norm",
    "eval_steps": "evaluation.every_steps", "logging_steps": "log.every_steps", "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep", "loraplus_lr_ratio": "train.lora_plus_ratio",
}
"""Keys of both frameworks that mean the same here -> ours."""
LLAMAFACTORY = {
    **SHARED, "model_name_or_path": "model.name_or_path", "model_revision": "model.revision", "lora_rank": "adapter.r",
    "use_dora": "adapter.use_dora", "use_rslora": "adapter.use_rslora", "cutoff_len": "data.max_length",
    "num_train_epochs": "train.num_epochs", "lr_scheduler_type": "train.lr_scheduler", "optim": "train.optimizer",
    "pref_beta": "train.dpo_beta", "max_new_tokens": "evaluation.max_new_tokens", "torch_compile": "model.compile",
}
AXOLOTL = {
    **SHARED, "base_model": "model.name_or_path", "lora_r": "adapter.r",
    "peft_use_dora": "adapter.use_dora", "peft_use_rslora": "adapter.use_rslora", "sequence_len": "data.max_length",
    "num_epochs": "train.num_epochs", "lr_scheduler": "train.lr_scheduler", "optimizer": "train.optimizer",
    "rl_beta": "train.dpo_beta", "early_stopping_patience": "evaluation.patience",
    "lora_modules_to_save": "adapter.modules_to_save", "torch_compile": "model.compile",
}
MODEL = "model.name_or_path"
VALUES: dict[str, dict[Any, Any]] = {
    "train.lr_scheduler": {name: name for name in ("linear", "cosine", "constant", "inverse_sqrt")}
    | {"constant_with_warmup": "constant"},
    "train.optimizer": dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw")
    | {name: name for name in ("adamw_8bit", "paged_adamw_8bit", "sgd")} | {"adamw_bnb_8bit": "adamw_8bit"},
    "model.gradient_checkpointing": {True: True, False: False, "unsloth": True, "offload": True, "offload_disk": True},
}
"""Keys of ours that take other words there -> their word to ours."""
ATTENTIONS = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "sdpa": "sdpa", "disabled": "eager"}
"""LLaMA-Factory's words for `model.attention`."""
NEEDLESS = frozenset((
    "do_train", "do_eval", "overwrite_output_dir", "overwrite_cache", "plot_loss", "preprocessing_num_workers",
    "dataloader_num_workers", "per_device_eval_batch_size", "eval_batch_size", "eval_strategy", "save_strategy",
    "save_only_model", "ddp_timeout", "model_type", "tokenizer_type", "dataset_prepared_path", "dataset_processes",
    "strict", "tf32", "pad_to_sequence_len", "eval_sample_packing", "group_by_length", "is_llama_derived_model",
    "load_best_model_at_end", "wandb_entity", "wandb_watch", "wandb_name", "wandb_log_model",
))
"""Keys about their own workings, which need no counterpart."""
WHERE: Mapping[str, str] = {
    **FAMILIAR, "tokens": "model.added_tokens", "add_tokens": "model.added_tokens",
    "add_special_tokens": "model.added_special_tokens", "special_tokens": "the tokenizer's own are taken",
    "lora_model_dir": "adapter.init_from", "adapter_name_or_path": "adapter.init_from",
    "pissa_init": "adapter.init_lora_weights=pissa", "mlflow_experiment_name": "MLFLOW_EXPERIMENT_NAME sets it",
    "fsdp_config": FAMILIAR["fsdp"], "fsdp_version": FAMILIAR["fsdp"],
}
"""Where here that is said which is not taken over."""


@dataclass(slots=True)
class Translation:
    """A config of ours in the making."""

    theirs: dict[str, Any]
    """What is still to be read. Null is what a key is without being written."""
    ours: dict[str, Any] = field(default_factory=dict)
    """By dotted key."""
    left: list[tuple[str, Any, str]] = field(default_factory=list)
    """Key, value, and why it is not taken over."""

    def take(self, key: str, default: Any = None) -> Any:
        """Read a key, which is done with then."""
        return self.theirs.pop(key, default)

    def leave(self, key: str, value: Any, why: str) -> None:
        """Name a key that is not taken over."""
        self.left.append((key, value, why))


@dataclass(frozen=True, slots=True)
class Dialect:
    """A framework's way to write a config."""

    name: str
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    """By our key, where theirs differs from ours."""
    particular: Callable[[Translation, int], None]
    """What takes more than another name for a key. The number: devices."""


def translate(path: str, dialect: Dialect, devices: int) -> Translation:
    """Read a file. Raises ConfigError: not YAML, or it learns what is not learned here."""
    theirs = {key: value for key, value in read(Path(path)).values.items() if value is not None}
    found = Translation(theirs, dict(dialect.defaults))
    try:
        dialect.particular(found, devices)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(Fault(kind="config", file=path, message=f"not a config of {dialect.name}: a value is of "
                                f"another kind than it takes: {error}", mend="mend it there")) from None
    adapted = "adapter.method" in found.ours
    for key, value in found.theirs.items():
        ours = dialect.keys.get(key)
        words = VALUES.get(ours or "")
        if ours is None:
            found.leave(key, value, "needless here" if key in NEEDLESS
                        else WHERE.get(key, "has no counterpart here"))
        elif ours.startswith("adapter.") and not adapted:
            found.leave(key, value, "all weights train, without an adapter")
        elif words is not None and value not in list(words):  # a list or a mapping is no key
            found.leave(key, value, f"{ours} takes {', '.join(dict.fromkeys(map(str, words.values())))}")
        elif unsuited := _unsuited(ours, value, found.ours["task"]):
            found.leave(key, value, unsuited)
        else:
            found.ours[ours] = value if words is None else words[value]
    if not adapted:
        found.ours["adapter"] = None
    if MODEL not in found.ours:
        model = next(theirs for theirs, ours in dialect.keys.items() if ours == MODEL)
        raise ConfigError(Fault(kind="config", file=path, message=f"not a config of {dialect.name}: {model} is missing",
                                mend="add it, or name the framework that it is of"))
    return found


def _unsuited(key: str, value: Any, task: str) -> str:
    """What our key takes, where a number of theirs does not suit it or the task: -1, or a share of steps."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    section, _, name = key.partition(".")
    values: dict[str, Any] = {"task": task, "model": {"name_or_path": "any"}, "data": {"train": "any"}}
    values[section] = {**values.get(section, {}), name: value} if name else value
    return "".join(f"{key}: {fault.mend}" for fault in faults_of(lambda: validate(Document(values)))[:1])


def _llamafactory(found: Translation, devices: int) -> None:
    task = {"sft": "causal_lm", "pt": "causal_lm", "dpo": "preference"}
    stage = found.take("stage", "sft")
    if stage not in task:
        raise _refused(f"stage: {stage}", "sft, pt or dpo")
    found.ours["task"] = task[stage]
    if stage == "pt":
        found.ours |= {"data.format": "text", "data.too_long": "split"}
    if stage == "dpo" and (loss := found.take("pref_loss", "sigmoid")) != "sigmoid":
        raise _refused(f"pref_loss: {loss}", "sigmoid, which is DPO")
    method = found.take("finetuning_type", "lora")
    if method not in ("lora", "full"):
        raise _refused(f"finetuning_type: {method}", "lora or full")
    if method == "lora":
        rank = found.theirs.get("lora_rank", 8)
        found.ours |= {"adapter.method": "lora", "adapter.r": rank, "adapter.lora_alpha": 2 * rank,
                       "adapter.target_modules": _targets(found.take("lora_target", "all"))}
        if found.theirs.get("additional_target"):
            found.ours["adapter.modules_to_save"] = _names(found.take("additional_target"))
    bits = found.take("quantization_bit")
    if bits is not None:
        kind = found.take("quantization_type", "nf4")
        found.ours["model.quantization"] = {8: "int8", 4: kind}.get(bits, bits)
    attention = found.take("flash_attn", "auto")
    if attention in ATTENTIONS:
        found.ours["model.attention"] = ATTENTIONS[attention]
    elif attention != "auto":
        found.leave("flash_attn", attention, f"what is taken over: {', '.join(ATTENTIONS)}")
    if any([found.take("packing", False), found.take("neat_packing", False)]):
        found.ours["data.layout"] = "packed"
    if found.take("train_on_prompt", False):
        found.ours["data.train_on"] = "all"
    if found.take("mask_history", False):
        found.ours["data.train_on"] = "last_turn"
    template = found.take("template")
    if template is not None:
        found.leave("template", template, "the tokenizer's own chat template is taken; data.chat_template sets another")
    reported = found.take("report_to", "none")
    found.ours["log.trackers"] = [] if reported in ("none", ["none"]) else _names(reported)
    _shared(found, "per_device_train_batch_size", 8, devices)
    llamafactory_data(found.take, found.ours, found.leave)


def _axolotl(found: Translation, devices: int) -> None:
    learned = found.take("rl")
    if learned not in (None, "dpo"):
        raise _refused(f"rl: {learned}", "dpo, or none")
    found.ours["task"] = "preference" if learned else "causal_lm"
    method = found.take("adapter")
    if method in ("lora", "qlora"):
        linear, named = found.take("lora_target_linear", False), found.take("lora_target_modules")
        found.ours |= {"adapter.method": "lora",
                       "adapter.target_modules": "all-linear" if linear or named is None else _targets(named)}
    elif method is not None:
        raise _refused(f"adapter: {method}", "lora, qlora, or none")
    eight, four = found.take("load_in_8bit", False), found.take("load_in_4bit", False)
    if eight or four:
        found.ours["model.quantization"] = "int8" if eight else "nf4"
    for key, attention in {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager",
                           }.items():
        if found.take(key, False):
            found.ours["model.attention"] = attention
    named = found.take("attn_implementation")
    if named is not None:
        found.ours["model.attention"] = named
    if found.take("sample_packing", False):
        found.ours["data.layout"] = "packed"
    if found.take("train_on_inputs", False):
        found.ours["data.train_on"] = "all"
    template = found.take("chat_template", "tokenizer_default")
    if template == "chatml":
        found.ours["data.chat_template"] = "chatml"
    elif template != "tokenizer_default":
        found.leave("chat_template", template, "the tokenizer's own is taken; data.chat_template sets another")
    if found.theirs.get("wandb_project"):
        found.leave("wandb_project", found.theirs["wandb_project"], "WANDB_PROJECT sets it; log.trackers has wandb")
    trackers = [name for name, key in (("wandb", "wandb_project"), ("mlflow", "use_mlflow"), ("trackio", "use_trackio"),
                                       ("tensorboard", "use_tensorboard")) if found.take(key)]
    found.ours["log.trackers"] = trackers
    for key, ours in (("evals_per_epoch", "evaluation"), ("saves_per_epoch", "checkpoint")):
        times = found.take(key, 1)
        if times != 1:
            found.leave(key, times, f"{ours}.every_steps counts steps; null is once an epoch")
    if found.theirs.get("bf16") is False and not found.theirs.get("fp16"):
        found.ours["model.dtype"] = "float32"
    _shared(found, "micro_batch_size", 1, devices)
    axolotl_data(found.take, found.ours, found.leave)


def _shared(found: Translation, per_device: str, default: int, devices: int) -> None:
    each, times = found.take(per_device, default), found.take("gradient_accumulation_steps", 1)
    found.ours["train.batch_size"] = each * times * devices
    if found.take("bf16", False):
        found.ours["model.dtype"] = "bfloat16"
    if found.take("fp16", False):
        found.leave("fp16", True, "float16 is not offered; model.dtype is bfloat16")


def _targets(named: Any) -> Any:
    return "all-linear" if named in ("all", ["all"]) else _names(named)


def _names(value: Any) -> list[str]:
    return [str(name).strip() for name in (value if isinstance(value, list) else str(value).split(","))]


def _refused(given: str, takes: str) -> ConfigError:
    return ConfigError(Fault(kind="config", message=f"{given} is not learned here", mend=f"what is: {takes}"))


DIALECTS = {dialect.name: dialect for dialect in (
    Dialect("llamafactory", LLAMAFACTORY, {
        "train.learning_rate": 5e-5, "train.lr_scheduler": "linear", "train.warmup_ratio": 0.0,
        "data.max_length": 2048}, _llamafactory),
    Dialect("axolotl", AXOLOTL, {"train.num_epochs": 1.0}, _axolotl),
)}
"""By the name that `peftune init --from-NAME` has for them."""
