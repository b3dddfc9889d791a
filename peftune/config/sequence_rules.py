"""What cannot train where several devices share each sequence: why, and the nearest thing that does."""

from __future__ import annotations

from peftune.config.refusal import Refusal
from peftune.config.schema import RunConfig
from peftune.errors import Fault

PROMPT_LEARNING = frozenset({"prompt_tuning", "p_tuning", "prefix_tuning", "multitask_prompt_tuning", "cpt"})
"""PEFT methods that train a prompt beside the model, and no weight inside it."""


SEQUENCE_RULES: tuple[Refusal[RunConfig], ...] = (
    Refusal(
        "task", lambda c: c.task != "causal_lm",
        "its losses and scores look at more than one token of a sequence, and each device has a part of them",
        "leave --sequence-parallel out, with model.gradient_checkpointing=true for long sequences",
    ),
    Refusal(
        "data.layout", lambda c: c.data.layout == "padded",
        "what is divided is a packed row", "data.layout=auto",
    ),
    Refusal(
        "model.attention", lambda c: c.model.attention not in ("auto", "sdpa"),
        "this attention has not been seen to work on a part of the heads",
        "model.attention=sdpa, which runs FlashAttention's kernel of torch on GPUs",
    ),
    Refusal(
        "model.compile", lambda c: c.model.compiles_whole,
        "packed rows have another shape each step", "model.compile=parts, or false",
    ),
    Refusal(
        "adapter.method", lambda c: c.adapter is not None and c.adapter.method.lower() in PROMPT_LEARNING,
        "a learned prompt lies before each sequence, in no part of the row", "adapter.method=lora",
    ),
    Refusal(
        "adapter.init_lora_weights", lambda c: c.adapter is not None and c.adapter.start == "eva",
        "EVA reads its examples whole before training", "adapter.init_lora_weights=true, or pissa",
    ),
)


def sequence_faults(config: RunConfig, ranks: int) -> list[Fault]:
    """Every rule that the config breaks where so many devices share a sequence."""
    if ranks < 1:
        return [Fault(kind="config", message=f"--sequence-parallel {ranks}", mend="use 1 or more")]
    return [Fault(kind="config", message=f"{rule.key}: not with sequences divided among {ranks}: {rule.why}",
                  mend=rule.mend) for rule in SEQUENCE_RULES if ranks > 1 and rule.broken_by(config)]
