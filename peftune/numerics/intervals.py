"""Bootstrap confidence intervals of metrics over examples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000
CHUNK_CELLS = 10_000_000
"""Resampling weights held at once: resamples times examples."""


def bootstrap_of_sums(
    features_NF: np.ndarray, metric: Callable[[np.ndarray], np.ndarray], *, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron, 1979) of a metric that is a function of sums over examples.

    A resample only changes how often each example counts, so all resamples are one matrix product.

    Args:
        features_NF: what each of N examples adds to each of F sums.
        metric: sums [R, F] -> metric [R]; NaN where undefined.
        level: coverage, 0.95 for a 95 % interval.

    Returns:
        Lower and upper bound, NaN if no resample defines the metric. The generator is seeded with N, so that
        equal records give equal bounds on every machine.
    """
    examples = features_NF.shape[0]
    generator = np.random.Generator(np.random.PCG64(examples))
    chunk = max(1, CHUNK_CELLS // max(1, examples))
    values = []
    for start in range(0, RESAMPLES, chunk):
        rows = min(chunk, RESAMPLES - start)
        drawn = generator.integers(0, examples, (rows, examples)) + examples * np.arange(rows)[:, None]
        weights_RN = np.bincount(drawn.ravel(), minlength=rows * examples).reshape(rows, examples)
        values.append(metric(weights_RN @ features_NF.astype(np.float64)))
    return _percentiles(np.concatenate(values), level)


def bootstrap_of_positions(
    statistic: Callable[[np.ndarray], float], examples: int, *, level: float = 0.95
) -> tuple[float, float]:
    """The same for a statistic of the resampled examples themselves (of ranks, say), one resample at a time."""
    generator = np.random.Generator(np.random.PCG64(examples))
    values = [statistic(generator.integers(0, examples, examples)) for _ in range(RESAMPLES)]
    return _percentiles(np.asarray(values), level)


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    if np.isnan(values).all():
        return float("nan"), float("nan")
    tail = 100 * (1 - level) / 2
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)
