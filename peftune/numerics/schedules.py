"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math


def learning_rate_factor(shape: str, step: int, steps: int, warmup_ratio: float) -> float:
    """Factor in (0, 1] on the peak learning rate for the optimizer step with index `step` (from 0).

    Warm-up takes ceil(warmup_ratio * steps) steps and rises in equal parts, so that no step has rate 0.
    After it, with p in [0, 1) the share of the remaining steps that is done:
    linear 1 - p; cosine (1 + cos(pi p)) / 2 (Loshchilov and Hutter, 2017, arXiv:1608.03983);
    constant 1; inverse_sqrt sqrt(w / (step + 1)) with w the warm-up steps, at least 1
    (Vaswani et al., 2017, arXiv:1706.03762).
    """
    warmup = math.ceil(round(warmup_ratio * steps, 9))  # 0.07 * 100 is more than 7
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if shape == "linear":
        return 1.0 - done
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if shape == "constant":
        return 1.0
    if shape == "inverse_sqrt":
        return math.sqrt(max(1, warmup) / (step + 1))
    raise AssertionError(f"unknown schedule {shape}")
