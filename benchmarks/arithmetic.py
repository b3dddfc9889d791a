"""What the benchmarks of speed compute from their measurements: rates, work of a step, ratios, and whether one fell."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

WARM_UP = 2
"""Steps that are not counted: the first ones fill caches, and a run of ours checks itself in them."""


def rates(record: Mapping[str, Any], warm_up: int = WARM_UP) -> dict[str, float]:
    """Of one run's steps after the first `warm_up`. The middle step's rate is what a virtual machine whose processors
    are taken away now and then would do without that.

    Args:
        record: lists with a value a step: step_seconds, tokens (without padding), total_tokens (with it),
            supervised_tokens, examples.
        warm_up: steps left out.
    """
    part = {key: record[key][warm_up:] for key in ("step_seconds", "tokens", "total_tokens", "supervised_tokens",
                                                   "examples")}
    seconds = sum(part["step_seconds"])
    ordered = sorted(part["step_seconds"])
    return {
        "tokens_per_second": sum(part["tokens"]) / seconds,
        "tokens_per_second_of_middle_step": statistics.median(
            tokens / one for tokens, one in zip(part["tokens"], part["step_seconds"])),
        "total_tokens_per_second": sum(part["total_tokens"]) / seconds,
        "supervised_tokens_per_second": sum(part["supervised_tokens"]) / seconds,
        "samples_per_second": sum(part["examples"]) / seconds,
        "step_p50_s": statistics.median(ordered), "step_p95_s": percentile(ordered, 0.95),
        "padding_share": 1 - sum(part["tokens"]) / sum(part["total_tokens"]),
    }


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed (nearest rank)."""
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def step_flops(
    lengths: Sequence[int], targets: int, *, body: int, adapters: int, vocabulary: int, width: int, layers: int,
    heads_width: int,
) -> float:
    """Floating-point operations that the loss and gradients of these sequences need; nothing that is computed twice.

    A weight matrix costs 2 a weight and token forward, 2 for the gradient of its input, and 2 for its own, if it
    trains: 4 N where the base is frozen, 6 N where it trains (Kaplan et al., 2020, arXiv:2001.08361, section 2.1). The
    output layer is needed for supervised tokens alone. Causal attention needs 2 products of l (l + 1) / 2 pairs
    forward, twice as many backward. Embeddings, norms and activations are left out.

    Args:
        lengths: tokens of each sequence.
        targets: supervised tokens.
        body: weights of the layers' matrices.
        adapters: trained weights beside a frozen base; 0 where all weights train.
        vocabulary: rows of the output layer, V.
        width: of the hidden states.
        layers: how many.
        heads_width: heads times their width.
    """
    tokens, of_frozen = sum(lengths), 4 if adapters else 6
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    return (tokens * (of_frozen * body + 6 * adapters) + of_frozen * targets * vocabulary * width
            + 3 * 2 * 2 * pairs * heads_width * layers)


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Minimum, median and maximum of repeats."""
    return {"runs": len(values), "min": min(values), "median": statistics.median(values), "max": max(values)}


def fallen(new: Mapping[str, float], old: Mapping[str, float], at_least: float) -> list[str]:
    """What became worse: each ratio that both have and that is less than `at_least` times the earlier one.

    Ratios within one run are compared, never rates: machines drift, and differ.
    """
    return [f"{name}: {new[name]:.3g}, and {old[name]:.3g} before" for name in sorted(set(new) & set(old))
            if new[name] < at_least * old[name]]
