"""What a folder of weights says of itself, a whole model's or an adapter's."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

CONFIG, ADAPTER = "config.json", "adapter_config.json"
"""A model's own config; an adapter's, which names its base model."""


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter, by its config."""
    return (folder / CONFIG).is_file() or (folder / ADAPTER).is_file()


def needs_config(task: str, *, adds_tokens: bool) -> bool:
    """Whether an adapter's folder needs the model's config beside the adapter's: for classes, or for added rows.

    Where it does not, the config would only mislead: transformers takes a folder that has one for a whole model, and
    finds the base of one that has none.
    """
    return task not in ("causal_lm", "preference") or adds_tokens


def base_of_adapter(folder: Path) -> tuple[str, str | None]:
    """Name and revision of the model that an adapter's folder belongs to.

    Raises:
        OSError, ValueError, KeyError: its config cannot be read.
    """
    known = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    return known["base_model_name_or_path"], known.get("revision")


def own_config(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model, or the one that an adapter's folder holds, or its base model's.

    Args:
        source: folder or hub id.
        revision: of the hub's repository.
        trust_remote_code: whether the model brings code of its own.

    Raises:
        Exception: what transformers raises of files that are missing or wrong.
    """
    if (Path(source) / ADAPTER).is_file() and not (Path(source) / CONFIG).is_file():
        source, revision = base_of_adapter(Path(source))
    return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
