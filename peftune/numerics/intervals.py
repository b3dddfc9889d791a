"""Bootstrap confidence intervals of a metric over examples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], examples: int, *, resamples: int = RESAMPLES, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron, 1979) of `statistic` over resampled examples.

    Args:
        statistic: takes the resampled example positions, int64 [examples], and gives the metric.
        examples: number of examples.
        resamples: number of resamples, each of `examples` positions drawn with replacement.
        level: coverage, 0.95 for a 95 % interval.

    Returns:
        Lower and upper bound. The generator is seeded with the example count, so that equal records
        give equal bounds on every machine.
    """
    generator = np.random.Generator(np.random.PCG64(examples))
    values = [statistic(generator.integers(0, examples, examples)) for _ in range(resamples)]
    tail = 100 * (1 - level) / 2
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)
