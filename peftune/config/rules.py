"""Combinations that cannot work: broken by what, why, and the nearest thing that does."""

from __future__ import annotations

from dataclasses import dataclass

from peftune.config.data_rules import DATA_RULES
from peftune.config.document import Document
from peftune.config.refusal import Refusal
from peftune.config.schema import RunConfig, Source
from peftune.config.sequence_rules import PROMPT_LEARNING, sequence_faults
from peftune.config.task_rules import TASK_RULES
from peftune.errors import ConfigError, Fault

METRICS: dict[str, tuple[str, ...]] = {
    "sequence_classification": (
        "loss", "accuracy", "macro_f1", "mcc", "micro_f1", "exact_match", "pearson", "spearman", "rmse"
    ),
    "token_classification": (
        "f1", "precision", "recall", "strict_f1", "strict_precision", "strict_recall", "accuracy", "loss"
    ),
    "question_answering": (
        "f1", "exact_match", "loss", "answerable_exact_match", "answerable_f1", "unanswerable_accuracy"
    ),
    "causal_lm": ("loss", "perplexity", "exact_match", "rouge_l", "bleu", "final_number"),
    "preference": ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward"),
}
"""Names that `evaluation.metric` takes, by task."""

GENERATION_METRICS = frozenset({"exact_match", "rouge_l", "bleu", "final_number"})
"""causal_lm metrics that need generated text."""

FORMATS: dict[str, tuple[str, ...]] = {
    "sequence_classification": ("classification",),
    "token_classification": ("ner",),
    "question_answering": ("squad",),
    "causal_lm": ("messages", "sharegpt", "alpaca", "prompt_completion", "text"),
    "preference": ("preference",),
}
"""Row formats by task."""


def _method(config: RunConfig) -> str | None:
    return None if config.adapter is None else config.adapter.method


def _is_lora(config: RunConfig) -> bool:
    return _method(config) == "lora"


def _has_prefix(config: RunConfig) -> bool:
    return _method(config) == "prefix_tuning"


def _is_activated(config: RunConfig) -> bool:
    """LoRA that begins at certain tokens of each row (aLoRA, arXiv:2504.12397)."""
    return config.adapter is not None and config.adapter.fields.get("alora_invocation_tokens") is not None


def keeps_activations(config: RunConfig) -> bool:
    """Whether the adapter cannot train with recomputed activations (see `RULES`)."""
    return _has_prefix(config) or _is_activated(config)


RULES: tuple[Refusal[RunConfig], ...] = (
    Refusal(
        "model.quantization",
        lambda c: c.model.quantization != "none" and c.adapter is None,
        "quantised weights do not train: a step is smaller than what separates their values",
        "adapter.method=lora, or model.quantization=none",
    ),
    Refusal(
        "model.quantization",
        lambda c: c.model.quantization != "none" and c.model.compiles_whole,
        "quantised layers have not been seen to compute the same when compiled",
        "model.compile=parts, or model.quantization=none",
    ),
    Refusal(
        "model.quantization",
        lambda c: c.model.quantization == "none" and c.adapter is not None and c.adapter.start == "loftq",
        "LoftQ starts from what quantisation has rounded away",
        "model.quantization=nf4, or adapter.init_lora_weights=true",
    ),
    Refusal(
        "data.layout",
        lambda c: c.data.layout == "packed" and c.model.compiles_whole,
        "packed rows have another shape each step, and a whole model is compiled for equal ones",
        "model.compile=parts, or data.layout=padded",
    ),
    Refusal(
        "data.layout",
        lambda c: c.data.layout == "packed" and c.model.attention == "eager",
        "eager attention reads across the borders of packed examples",
        "model.attention=sdpa, or data.layout=padded",
    ),
    Refusal(
        "data.format",
        lambda c: c.data.format != "auto" and c.data.format not in FORMATS[c.task],
        "not a format that this task can learn from",
        "data.format=auto, or one of the task's own: "
        + "; ".join(f"{task}: {', '.join(names)}" for task, names in FORMATS.items()),
    ),
    Refusal(
        "data.too_long",
        lambda c: c.data.too_long == "split" and c.task != "causal_lm",
        "only plain text goes on in further examples",
        "data.too_long=truncate, or task=causal_lm; question_answering makes windows by itself",
    ),
    Refusal(
        "data.train_on",
        lambda c: c.data.train_on != "completion" and c.task != "causal_lm",
        "only causal_lm chooses between tokens of its text",
        "data.train_on=completion",
    ),
    Refusal(
        "data.doc_stride",
        lambda c: c.task == "question_answering" and (c.data.doc_stride or 0) >= c.data.max_length,
        "neighbouring windows share fewer tokens than a window has",
        "data.doc_stride=null, or less than data.max_length",
    ),
    Refusal(
        "data.train",
        lambda c: any(isinstance(s, Source) and s.shuffle_buffer is not None and not s.streaming
                      for part in (c.data.train, c.data.validation, c.data.test) if isinstance(part, tuple)
                      for s in part),
        "shuffle_buffer is for streaming sources; others are shuffled whole, each epoch anew",
        "streaming: true, or leave shuffle_buffer out",
    ),
    Refusal(
        "model.pure_bf16",
        lambda c: c.model.pure_bf16 and c.model.dtype != "bfloat16",
        "pure_bf16 keeps all weights in bfloat16",
        "model.dtype=bfloat16, or model.pure_bf16=false",
    ),
    Refusal(
        "data.validation",
        lambda c: isinstance(c.data.validation, float) and not 0 < c.data.validation < 1,
        "a fraction of the training rows lies between 0 and 1",
        "data.validation=0.1, a path, or null for none",
    ),
    Refusal(
        "evaluation.patience",
        lambda c: c.evaluation.patience is not None and c.data.validation is None,
        "early stopping needs validation data",
        "data.validation=0.1, or evaluation.patience=null",
    ),
    Refusal(
        "evaluation.metric",
        lambda c: c.evaluation.metric is not None and c.evaluation.metric not in METRICS.get(c.task, ()),
        "not a metric of this task",
        "evaluation.metric=null, loss, or one of the task's own: "
        + "; ".join(f"{task}: {', '.join(names)}" for task, names in METRICS.items()),
    ),
    Refusal(
        "train.lora_plus_ratio",
        lambda c: c.train.lora_plus_ratio is not None and not _is_lora(c),
        "LoRA+ gives the matrices B of LoRA a learning rate of their own, and there are none",
        "adapter.method=lora, or train.lora_plus_ratio=null",
    ),
    Refusal(
        "train.optimizer",
        lambda c: _method(c) == "adalora" and c.train.optimizer != "adamw",
        "AdaLoRA keeps the importance of its ranks beside AdamW's moments",
        "train.optimizer=adamw, or adapter.method=lora",
    ),
    Refusal(
        "model.gradient_checkpointing",
        lambda c: c.model.gradient_checkpointing is True and _has_prefix(c),
        "a learned prefix lies in the attention's cache, and recomputed layers have none",
        "model.gradient_checkpointing=false, or adapter.method=prompt_tuning or lora",
    ),
    Refusal(
        "model.gradient_checkpointing",
        lambda c: c.model.gradient_checkpointing is True and _is_activated(c),
        "PEFT does not say to recomputed layers where activated LoRA begins",
        "model.gradient_checkpointing=false, or adapter.alora_invocation_tokens=null",
    ),
    Refusal(
        "evaluation.max_new_tokens",
        lambda c: c.evaluation.metric in GENERATION_METRICS
        and c.task == "causal_lm" and c.evaluation.max_new_tokens == 0,
        "this metric scores generated text, and nothing is generated",
        "evaluation.max_new_tokens=128, or evaluation.metric=loss",
    ),
    *DATA_RULES,
    *TASK_RULES,
)


@dataclass(frozen=True, slots=True)
class StrategyRule(Refusal[RunConfig]):
    """A config that cannot train under some strategies."""

    strategies: tuple[str, ...]
    """Beginnings of their names."""


STRATEGY_RULES: tuple[StrategyRule, ...] = (
    StrategyRule(
        "adapter.method",
        lambda c: c.adapter is not None and c.adapter.method in PROMPT_LEARNING,
        "peft reads a learned prompt past the hooks that gather divided weights",
        "--strategy zero2 or ddp, or adapter.method=lora",
        ("zero3", "fsdp2"),
    ),
    StrategyRule(
        "adapter.method",
        lambda c: c.adapter is not None and c.adapter.method == "adalora",
        "AdaLoRA looks at whole weights with their gradients in the optimizer's step",
        "--strategy ddp, or adapter.method=lora",
        ("zero", "fsdp2"),
    ),
    StrategyRule(  # pytorch/pytorch#115484 for ZeRO-3, meta-pytorch/torchtune#1516 for FSDP2 with LoRA
        "model.compile",
        lambda c: c.model.compiles_whole,
        "a compiled model does not see the hooks that gather and divide its weights",
        "model.compile=parts, or --strategy ddp",
        ("zero", "fsdp2"),
    ),
    StrategyRule(
        "train.optimizer",
        lambda c: c.train.optimizer.endswith("8bit"),
        "its state is rounded in blocks of whole weights, which no rank holds: other blocks train another model",
        "train.optimizer=adamw, whose state the ranks divide, or --strategy ddp",
        ("zero", "fsdp2"),
    ),
    StrategyRule(
        "model.pure_bf16",
        lambda c: c.model.pure_bf16,
        "DeepSpeed keeps float32 masters of trained weights, which pure_bf16 is meant to avoid",
        "model.pure_bf16=false, or --strategy fsdp2 or ddp",
        ("zero",),
    ),
)


def strategy_faults(config: RunConfig, strategy: str) -> list[Fault]:
    """Every rule that the config breaks under a strategy."""
    return [Fault(kind="config", message=f"{rule.key}: not with {strategy}: {rule.why}", mend=rule.mend)
            for rule in STRATEGY_RULES if strategy.startswith(rule.strategies) and rule.broken_by(config)]


def refuse_broken(config: RunConfig, strategy: str, sequence_ranks: int = 1) -> None:
    """Raise ConfigError with every rule that the config breaks under a strategy, and where ranks share sequences."""
    faults = strategy_faults(config, strategy) + sequence_faults(config, sequence_ranks)
    if faults:
        raise ConfigError(faults)


def broken_rules(config: RunConfig, document: Document) -> list[Fault]:
    """Every broken rule as a fault, so that a mend needs one round and not five."""
    faults = []
    whole, short = (config.model_dump(mode="json", exclude_defaults=without) for without in (False, True))
    for rule in RULES:
        if rule.broken_by(config):
            section, name = rule.key.split(".")
            place = document.place((section, name)) or (None, None)
            value = short.get(section, {}).get(name, whole[section][name])
            faults.append(Fault(kind="config", file=place[0], line=place[1],
                                message=f"{rule.key} = {value!r}: {rule.why}", mend=rule.mend))
    return faults
