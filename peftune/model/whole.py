"""Exported files: a whole model in the type asked for, or an adapter as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from peftune.model.folder import ADAPTER, CONFIG, own_config
from peftune.model.merge import Adapter

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
    configs = (source / name for name in (ADAPTER, CONFIG) if (source / name).is_file())
    for file in (*configs, *source.glob("*.safetensors")):
        shutil.copyfile(file, folder / file.name)
    base = model.get_base_model()
    if base.can_generate():
        base.generation_config.save_pretrained(str(folder))


def own_dtype(adapter: Adapter, trust_remote_code: bool) -> torch.dtype:
    """The type of the weights in the checkpoint that an adapter was trained on, by its config."""
    config = own_config(adapter.base, revision=adapter.revision, trust_remote_code=trust_remote_code)
    return config.dtype or torch.float32
