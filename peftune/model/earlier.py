"""An earlier adapter, to be trained on or kept frozen beneath a new one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, TaskType

from peftune.errors import ConfigError, Fault
from peftune.model.folder import ADAPTER
from peftune.model.foreign import reading


def earlier_folder(key: str, name: str) -> Path:
    """The folder of an adapter: a run's final/, or one that holds an adapter itself.

    Raises:
        ConfigError: neither.
    """
    path = Path(name)
    for folder in (path / "final", path):
        if (folder / ADAPTER).is_file() and (folder / "adapter_model.safetensors").is_file():
            return folder
    raise ConfigError(Fault(kind="config", message=f"adapter.{key} = {name!r}: no adapter lies there",
                            mend=f"a finished run, or a folder with {ADAPTER} and adapter_model.safetensors"))


def read_earlier(key: str, name: str) -> tuple[PeftConfig, Path]:
    """The PEFT config of an earlier adapter, ready to train, and its folder.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    folder = earlier_folder(key, name)
    with reading_adapter(key, folder):
        config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    return config, folder


def reading_adapter(key: str, folder: Path) -> AbstractContextManager[None]:
    """Around what reads an earlier adapter: what it raises becomes a ConfigError about `adapter.<key>`."""
    return reading(lambda why: ConfigError(Fault(
        kind="config", file=str(folder), message=f"adapter.{key} cannot be read: {why}",
        mend="give a folder that peftune or peft has written")))


def continued(name: str, method: str, values: dict[str, Any], task_type: TaskType | None) -> PeftConfig:
    """The config of the adapter that `init_from` names; what is given beside it must say the same.

    Args:
        name: adapter.init_from.
        method: adapter.method.
        values: the other keys of the section.
        task_type: PEFT's name of the task.

    Raises:
        ConfigError: no such adapter, another method or task, or other values.
    """
    earlier, _ = read_earlier("init_from", name)
    kind = earlier.peft_type.value.lower()
    if method != kind:
        raise ConfigError(Fault(kind="config", message=f"adapter.method = {method!r}, but adapter.init_from holds "
                                f"{kind}", mend=f"adapter.method={kind}"))
    if earlier.task_type != task_type:
        raise ConfigError(Fault(kind="config", mend="give an adapter of the same task",
                                message=f"adapter.init_from was trained for {earlier.task_type}, not {task_type}"))
    other = [key for key in sorted(values) if _shown(values[key]) != _shown(_value(earlier, key))]
    if other:
        raise ConfigError([Fault(
            kind="config", message=f"adapter.{key} = {values[key]!r}, but the adapter in adapter.init_from has "
            f"{_value(earlier, key)!r}", mend="leave the key out: its value comes with the adapter") for key in other])
    return earlier


def frozen_beneath(name: str) -> tuple[LoraConfig, Path]:
    """The LoRA that `stack_on` names.

    Raises:
        ConfigError: no such adapter, or one that is not a plain LoRA.
    """
    earlier, folder = read_earlier("stack_on", name)
    found = f"is {earlier.peft_type.value.lower()}"
    if type(earlier) is LoraConfig:
        found = "has " + ", ".join(what for what, has in (
            ("DoRA", earlier.use_dora), ("biases", earlier.lora_bias or earlier.bias != "none"),
            ("a trained layer", earlier.modules_to_save),
            ("trained token rows", earlier.trainable_token_indices)) if has)
    if found != "has ":
        raise ConfigError(Fault(
            kind="config", message=f"adapter.stack_on = {name!r}: {found}, and only a plain LoRA can lie beneath "
            "another", mend="merge it first (peftune export --merge) and name the merged folder in "
            "model.name_or_path, or train it on with adapter.init_from"))
    return earlier, folder


def check_same_base(key: str, config: PeftConfig, source: str) -> None:
    """Raise ConfigError where an earlier adapter says that it was trained on another model."""
    base = config.base_model_name_or_path
    if base and base != source and (not base.startswith("/") or Path(base).is_dir()):
        raise ConfigError(Fault(kind="config", message=f"adapter.{key} was trained on {base}, not on {source}",
                                mend=f"model.name_or_path={base}"))


def _value(config: PeftConfig, key: str) -> Any:
    return vars(config)[key]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return repr(dict(sorted(value.items(), key=str)))
    return repr(sorted(value, key=str) if isinstance(value, set | list | tuple) else value)
