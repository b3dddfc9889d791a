"""What a run stores of its plan, to be compared with what it measures."""

from __future__ import annotations

from typing import Any

from peftune.plan.choose import MemoryChoice


def memory_facts(choice: MemoryChoice) -> dict[str, Any]:
    """The settings that `auto` became, and the predicted peaks."""
    facts: dict[str, Any] = {"micro_batch_tokens": choice.micro_batch_tokens,
                             "gradient_checkpointing": choice.gradient_checkpointing}
    found = choice.predicted
    memory: dict[str, Any] = {"baseline_bytes": choice.baseline_bytes, "predicted": None}
    if found is None:
        return {**facts, "memory": {**memory, "why_not": choice.why_not}}
    instants = {name: {cause: round(size) for cause, size in causes.items() if size >= 1}
                for name, causes in found.instants.items()}
    return {**facts, "memory": {**memory, "predicted": {
        "peak_bytes": found.peak_bytes, "peak_instant": found.peak_instant,
        "instants": {name: sum(causes.values()) for name, causes in instants.items()}, "by_cause": instants}}}


def memory_note(choice: MemoryChoice) -> str:
    """The prediction in a word, for a person."""
    if choice.predicted is None:
        return f"memory is not predicted: {choice.why_not}"
    return f"{choice.predicted.peak_bytes / 2**30:.2f} GiB predicted, at {choice.predicted.peak_instant}"
