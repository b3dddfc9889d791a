"""A model's text side: its config and tokenizer, and how a task makes tokens with them."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import is_offline_mode
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from peftune.config.schema import AdapterConfig, DataConfig, ModelConfig
from peftune.data.chat import choose_template
from peftune.data.prepare import Prepared
from peftune.errors import ConfigError, Fault
from peftune.model.adapters import virtual_tokens
from peftune.model.heads import require_head
from peftune.model.load import longest_input
from peftune.model.resolve import load_model_config, load_tokenizer, resolve
from peftune.numerics.counted import counted
from peftune.tasks.task import BoundEncoder, Task, TextEncoder

CHAT_FORMATS = frozenset({"messages", "sharegpt", "alpaca", "preference"})


@dataclass(frozen=True, slots=True)
class Text:
    """What is known of a model before its weights are loaded."""

    source: str
    """Local folder or hub id."""
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    template: str
    """Which chat template is in use, for a person; none where the task has no conversations."""
    encoder: BoundEncoder
    virtual_tokens: int = 0
    """Of a learned prompt before each text."""
    hub_is_silent: bool = False
    """Asked for a cached model, the hub did not answer."""

    def behind(self, virtual_tokens: int) -> Text:
        """The same with a learned prompt before each text, which leaves examples fewer of the model's positions.

        Raises:
            ConfigError: it leaves none.
        """
        limit = longest_input(self.config, self.encoder.text.data.max_length, virtual_tokens)
        if limit < 1:
            raise ConfigError(Fault(
                kind="config", message=f"adapter.num_virtual_tokens = {virtual_tokens}: the model has "
                f"{limit + virtual_tokens} positions, and none is left for text",
                mend="fewer virtual tokens, such as 20"))
        encoder = replace(self.encoder, text=replace(self.encoder.text, max_length=limit))
        return replace(self, encoder=encoder, virtual_tokens=virtual_tokens)

    def identity(self) -> dict[str, Any]:
        """What the tokens of a row depend on besides the data section: tokenizer, template, task, and our code."""
        tokenizer = self.tokenizer
        backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else self.source
        code = hashlib.sha256()
        package = Path(__file__).parents[1]
        for file in sorted([*package.glob("data/*.py"), *package.glob("tasks/*.py")]):
            code.update(file.read_bytes())
        return {"task": self.encoder.task.name, "limit": self.encoder.text.max_length,
                "template": tokenizer.chat_template, "tokenizer": hashlib.sha256(backend.encode()).hexdigest(),
                "eos": tokenizer.eos_token, "pad": tokenizer.pad_token, "code": code.hexdigest()}


def open_text(
    task: Task, model: ModelConfig, data: DataConfig, adapter: AdapterConfig | None = None, *, trained: bool = False
) -> Text:
    """Find the model, read its config and tokenizer, choose the chat template.

    `adapter`: what is to be trained. `trained`: the model is trained weights to use, perhaps an adapter.

    Raises:
        ModelError, MachineError: the model or its tokenizer cannot be had.
        ConfigError: no such chat template, or an adapter that cannot work.
    """
    was_off = is_offline_mode()
    source = resolve(model, trained=trained)
    config = load_model_config(model, source)
    require_head(task.auto_class, config, task.name)
    tokenizer = load_tokenizer(model, source, generates=task.converses)
    template = choose_template(tokenizer, data.chat_template) if task.converses else "none"
    limit = longest_input(config, data.max_length)
    encoder = BoundEncoder(task, TextEncoder(tokenizer, limit, data))
    text = Text(source, config, tokenizer, template, encoder, hub_is_silent=is_offline_mode() and not was_off)
    return text.behind(virtual_tokens(adapter, task.name))


def quiet_libraries() -> None:
    """Their load reports and progress bars would drown ours; what matters of them is said by us."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # transformers 5 renames gradient to activation checkpointing; peft 0.21 and transformers 5.17 know the old name
    # only. Delete this, and use the new name, once both know it
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has changed: each rank would print that in each step.
    # Delete this with a DeepSpeed that knows the new ones
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


def data_notes(data: Prepared, text: Text, config: DataConfig) -> list[str]:
    """What was found and done, for a person."""
    notes = [" + ".join(f"{counts.kept:,} {name}" for name, counts in data.counts.items()) + " rows"]
    notes.append("format " + ", ".join(sorted(set(data.formats.values()))))
    if data.targets.names:
        notes.append(f"{counted(len(data.targets.names), 'class')} ({data.targets.problem})")
    if text.template != "none" and CHAT_FORMATS & set(data.formats.values()):
        notes.append(f"chat template: {text.template}")
    for name, counts in data.counts.items():
        if counts.examples != counts.kept:
            notes.append(counted(counts.examples, f"{name} example"))
    if text.hub_is_silent:
        notes.append("the hub does not answer: the model is the cached one")
    if text.encoder.text.max_length < config.max_length:
        beside = f" beside the {text.virtual_tokens} of the learned prompt" if text.virtual_tokens else ""
        notes.append(f"the model reads at most {text.encoder.text.max_length} tokens{beside}")
    return notes


def data_warnings(data: Prepared) -> list[str]:
    """What a person should look at before trusting the run."""
    warnings = [f"{counts.bad:,} of {counts.rows:,} rows of {name} are bad and were left out"
                for name, counts in data.counts.items() if counts.bad]
    warnings += [finding.message for finding in data.findings]
    return [*warnings, "peftune check says where, and the mend"] if warnings else []
