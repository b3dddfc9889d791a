"""Unknown keys: the names other frameworks use, and the nearest of ours."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from peftune.config.schema import RunConfig, Source

_BATCH = (
    "train.batch_size=N, the examples of one optimizer step over all devices "
    "(per device x devices x accumulation); train.tokens_per_micro_batch bounds the memory"
)

_EVAL_BATCH = "nothing: evaluation batches have a fixed size, and scores do not depend on it"
_AT_LAUNCH = "nothing here: choose it at launch, with peftune train --processes N --strategy NAME"
_BETAS = "nothing: AdamW's betas are 0.9 and 0.999"
_LONG_SEQUENCES = (
    "nothing here: choose it at launch, with --sequence-parallel N, or parallelism_config_sp_size: N in accelerate's "
    "parallelism_config"
)
FAMILIAR: dict[str, str] = {
    "per_device_train_batch_size": _BATCH,
    "per_device_eval_batch_size": _EVAL_BATCH,
    "eval_batch_size": _EVAL_BATCH,
    "gradient_accumulation_steps": _BATCH,
    "micro_batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "global_batch_size": _BATCH,
    "lr": "train.learning_rate",
    "epochs": "train.num_epochs",
    "num_train_epochs": "train.num_epochs",
    "lr_scheduler_type": "train.lr_scheduler",
    "scheduler": "train.lr_scheduler",
    "warmup_steps": "train.warmup_ratio, a share of the steps",
    "optim": "train.optimizer",
    "gradient_clipping": "train.max_grad_norm",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "rank": "adapter.r",
    "alpha": "adapter.lora_alpha",
    **{key: f"adapter.{key}" for key in (
        "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_dora", "use_rslora",
        "init_lora_weights", "layers_to_transform", "rank_pattern", "alpha_pattern")},
    "lora": "adapter: {method: lora, r: 16, lora_alpha: 32, target_modules: all-linear}",
    "peft": "adapter.method, and the method's own fields beside it",
    "num_processes": _AT_LAUNCH,
    "strategy": _AT_LAUNCH,
    "adam_beta1": _BETAS,
    "adam_beta2": _BETAS,
    "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "lora_target_linear": "adapter.target_modules=all-linear",
    "peft_method": "adapter.method",
    "finetuning_type": "adapter.method, or adapter=null for full fine-tuning",
    "use_peft": "adapter.method, or adapter=null for full fine-tuning",
    "model_name_or_path": "model.name_or_path",
    "model_name": "model.name_or_path",
    "base_model": "model.name_or_path",
    "pretrained_model_name_or_path": "model.name_or_path",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype=bfloat16",
    "fp16": "model.dtype=bfloat16 (float16 is not offered: it needs loss scaling)",
    "mixed_precision": "model.dtype",
    "load_in_8bit": "model.quantization=int8",
    "load_in_4bit": "model.quantization=nf4",
    "quantization_bit": "model.quantization=int8 or nf4",
    "attn_implementation": "model.attention",
    "flash_attention": "model.attention=flash_attention_2",
    "flash_attn": "model.attention=flash_attention_2",
    "torch_compile": "model.compile",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "dataset_path": "data.train",
    "train_file": "data.train",
    "validation_file": "data.validation",
    "val": "data.validation",
    "eval": "data.validation for the rows, evaluation for when they are scored",
    "val_size": "data.validation, a fraction",
    "val_set_size": "data.validation, a fraction",
    "test_file": "data.test",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "block_size": "data.max_length",
    "template": "data.chat_template",
    "packing": "data.layout=packed",
    "sample_packing": "data.layout=packed",
    "train_on_inputs": "data.train_on=all or completion",
    "label_all_tokens": "data.subtokens=all",
    "stride": "data.doc_stride",
    "doc_stride": "data.doc_stride",
    "max_answer_length": "evaluation.max_answer_tokens",
    "n_best_size": "evaluation.n_best",
    "null_score_diff_threshold": "evaluation.no_answer_threshold",
    "beta": "train.dpo_beta",
    "pref_beta": "train.dpo_beta",
    "dpo_beta": "train.dpo_beta",
    "eval_packing": "nothing: evaluation batches are always padded",
    "streaming": "data.train=[{path: ..., streaming: true}]",
    "num_labels": "data.labels, or nothing: the classes are read from the training rows",
    "label_names": "data.labels",
    "logging_steps": "log.every_steps",
    "report_to": "log.trackers",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "evaluation.every_steps",
    "evaluation_strategy": "evaluation.every_steps, null for each epoch",
    "eval_strategy": "evaluation.every_steps, null for each epoch",
    "early_stopping_patience": "evaluation.patience",
    "metric_for_best_model": "evaluation.metric",
    "load_best_model_at_end": "nothing: best/ is always kept",
    "resume_from_checkpoint": "resume",
    "overwrite_output_dir": "output_dir: a run folder is never written over",
    "deepspeed": "nothing here: choose it at launch, with --config_file launch/accelerate/<preset>.yaml or --strategy",
    "sequence_parallel": _LONG_SEQUENCES,
    "sequence_parallel_size": _LONG_SEQUENCES,
    "context_parallel_size": _LONG_SEQUENCES,
    "sp_size": _LONG_SEQUENCES,
    "cp_size": _LONG_SEQUENCES,
    "ulysses": _LONG_SEQUENCES,
    "fsdp": "nothing here: choose it at launch, with --config_file launch/accelerate/<preset>.yaml or --strategy",
}


def key_paths(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the config, sections before their keys."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in _sections(field.annotation):
            yield from key_paths(section, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _sections(member)


def right_spelling(path: str) -> str:
    """What to write instead of the unknown key `path`."""
    section, _, leaf = path.rpartition(".")
    in_list = section.endswith("]")  # one of several sources of data
    known = [f"{section}.{name}" for name in Source.model_fields] if in_list else list(key_paths())
    if leaf in FAMILIAR and not in_list:
        return f"write {FAMILIAR[leaf]}"
    moved = [key for key in known if key.rpartition(".")[2] == leaf]
    if moved:
        return f"write {' or '.join(moved)}"
    near = [] if in_list else difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    near_leaf = difflib.get_close_matches(leaf, [key.rpartition(".")[2] for key in known], n=1, cutoff=0.6)
    near = near or [key for key in known if near_leaf and key.rpartition(".")[2] == near_leaf[0]]
    if near:
        return f"did you mean {' or '.join(near)}?"
    siblings = [key for key in known if key.rpartition(".")[0] == section] or known
    return f"the keys here are {', '.join(siblings)}"
