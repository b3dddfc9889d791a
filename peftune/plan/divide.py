"""What a strategy divides among the ranks, and what it needs beside it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from peftune.parallel.zero_config import BUCKETS_OF_A_MODEL, LARGEST_BUCKET, LARGEST_LIVE, LIVE_PARTS_OF_A_MODEL
from peftune.plan.layers import Bytes

WIDE_BYTES = 4
"""Of a value that DeepSpeed reduces, gathers or keeps a copy of: all trainable weights are float32."""


@dataclass(frozen=True, slots=True)
class Division:
    """A strategy and how many ranks share."""

    strategy: str = "single"
    ranks: int = 1
    sharing: int = 1
    """Neighbouring ranks that share each sequence; a divisor of the ranks."""

    @property
    def hands(self) -> int:
        """Groups of ranks, each of which takes examples of its own."""
        return self.ranks // self.sharing

    @property
    def weights_too(self) -> bool:
        """Whether weights are divided."""
        return self.strategy in ("zero3", "zero3-offload", "fsdp2")


def divided(
    part: Bytes, held: Bytes, layers: int, division: Division, *, outside: float, computing: bool, training: bool
) -> defaultdict[str, float]:
    """What of a single process's bytes a rank holds, and the strategy's own buffers.

    Args:
        part: bytes by cause of an instant, as one process has them.
        held: the states, as one process has them.
        layers: of the model; FSDP2 gathers one at a time, and the next one before it is needed.
        division: strategy and ranks.
        outside: bytes of weights that lie in no layer, which FSDP2 keeps gathered until a step ends.
        computing: the model computes at this instant, and needs its weights whole.
        training: gradients are exchanged at this instant.
    """
    found, ranks = defaultdict(float, part), division.ranks
    trained = held["adapters"] or held["weights"]
    frozen = held["weights"] if held["adapters"] else 0.0
    values = (trained + frozen) / WIDE_BYTES
    bucket = WIDE_BYTES * min(LARGEST_BUCKET, values / BUCKETS_OF_A_MODEL)
    match division.strategy:
        case "ddp":
            found["gradients"] = trained  # DDP's buckets lie there from the start, and gradients are views of them
        case "zero1" | "zero2":
            found["optimizer"] = (held["optimizer"] + trained) / ranks  # with a copy of the rank's part of the weights
            if training and division.strategy == "zero1":
                found["gradients"] = trained
            elif training and part["gradients"]:  # as backward brings them: gathered for the rank's part, then laid end
                found["gradients"] = 2 * part["gradients"] / ranks  # to end for the optimizer
                found["exchange_buffers"] = min(2 * bucket, trained)
        case "zero3" | "zero3-offload":
            on_host = division.strategy == "zero3-offload"
            for cause in ("weights", "adapters"):
                found[cause] = 0.0 if on_host else found[cause] / ranks
            found["optimizer"] = 0.0 if on_host else (held["optimizer"] + trained) / ranks
            if computing:
                found["exchange_buffers"] = WIDE_BYTES * min(LARGEST_LIVE, values / LIVE_PARTS_OF_A_MODEL) + bucket
            if training:
                found["gradients"] = trained / ranks
                found["exchange_buffers"] += min(2 * bucket, trained)
        case "fsdp2":
            for cause in ("weights", "adapters", "gradients", "optimizer"):
                found[cause] /= ranks
            if computing:
                gathered = outside + 2 * (trained + frozen - outside) / max(1, layers)
                found["exchange_buffers"] = gathered + (2 * trained / max(1, layers) if training else 0.0)
    return found
