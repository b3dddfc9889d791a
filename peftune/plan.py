"""Will it fit: the first-order memory estimate behind `auto` settings."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedConfig

LARGEST_AUTO_TOKENS = 16_384
CPU_AUTO_TOKENS = 4_096
"""More tokens at once do not make a CPU faster; they only cost memory."""
SHARE = 0.6
"""Share of the free memory that activations may take; the rest is for what this estimate leaves out."""


@dataclass(frozen=True, slots=True)
class MemoryChoice:
    """What `auto` became."""

    micro_batch_tokens: int
    gradient_checkpointing: bool


def activation_bytes_per_token(config: PreTrainedConfig, length: int, bytes_per_value: int, *, recompute: bool) -> int:
    """Bytes kept for backward per token: 34 h + 5 a s values' halves a layer, plus the logits in float32.

    Source: Korthikanti et al., 2022, arXiv:2205.05198, equation 1, with h the hidden size, a the heads and s the
    length; their 34 h + 5 a s bytes hold for 16-bit values. With recomputation only each layer's input is kept.
    SDPA does not keep the [a, s, s] scores, so that term is an upper bound.
    """
    text = config.get_text_config()
    hidden, layers, heads = text.hidden_size, text.num_hidden_layers, text.num_attention_heads
    layer = hidden * bytes_per_value if recompute else (34 * hidden + 5 * heads * length) * bytes_per_value // 2
    return layers * layer + 2 * 4 * text.vocab_size


def choose_memory(
    config: PreTrainedConfig, *, device: torch.device, longest: int, bytes_per_value: int, trainable_bytes: int,
    tokens: int | None, checkpointing: bool | None, sequence_ranks: int = 1,
) -> MemoryChoice:
    """Resolve `tokens_per_micro_batch: auto` and `gradient_checkpointing: auto` against the free memory.

    Args:
        config: of the model.
        device: the memory that is asked; a GPU holds the weights already.
        longest: tokens of the longest example: one such must fit.
        bytes_per_value: of activations.
        trainable_bytes: of the trained weights; gradients and AdamW states take three times as much again.
        tokens: what the config says, None for auto.
        checkpointing: what the config says, None for auto.
        sequence_ranks: devices that share each micro-batch, and so what it keeps.
    """
    room = sequence_ranks * SHARE * (free_bytes(device) - 3 * trainable_bytes)
    plain = activation_bytes_per_token(config, longest, bytes_per_value, recompute=False)
    recompute = checkpointing if checkpointing is not None else longest * plain > room
    if tokens is not None:
        return MemoryChoice(tokens, recompute)
    per_token = activation_bytes_per_token(config, longest, bytes_per_value, recompute=recompute)
    largest = sequence_ranks * (CPU_AUTO_TOKENS if device.type == "cpu" else LARGEST_AUTO_TOKENS)
    return MemoryChoice(max(longest, min(largest, int(room // per_token))), recompute)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
