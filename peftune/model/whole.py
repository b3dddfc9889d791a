"""Exported files: a whole model in the type asked for, or an adapter as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from peftune.model.save import ADAPTER

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save_whole(model: PreTrainedModel, folder: Path, dtype: torch.dtype, shard_size: str) -> None:
    """Round the weights to `dtype`, write them as safetensors shards with config and generation config, and widen them.

    The model is left with the rounded weights in float32: what the folder must load to. Buffers are not rounded, as
    loading rounds none.

    Args:
        model: float32.
        folder: to fill.
        dtype: of the files.
        shard_size: largest size of a file, such as 5GB.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if "use_cache" in model.config.to_dict():
        model.config.use_cache = True
    model.save_pretrained(str(folder), max_shard_size=shard_size)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()


def save_tokenizer(source: str, folder: Path, *, trust_remote_code: bool) -> None:
    """The tokenizer as it lies in `source`, with its chat template."""
    AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code).save_pretrained(str(folder))


def copy_adapter(source: Path, model: PeftModel, folder: Path) -> None:
    """An adapter's files as they lie in `source`, and the base model's generation config."""
    for file in (ADAPTER, "config.json", *(path.name for path in source.glob("*.safetensors"))):
        shutil.copyfile(source / file, folder / file)
    base = model.get_base_model()
    if base.can_generate():
        base.generation_config.save_pretrained(str(folder))


def own_dtype(name: str, revision: str | None, trust_remote_code: bool) -> torch.dtype:
    """The type of the weights in a checkpoint, by its config."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision)
    return config.dtype or torch.float32
