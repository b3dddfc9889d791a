"""Bootstrap over examples: confidence intervals of metrics, and of the difference between two models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 1000
CHUNK_CELLS = 10_000_000
"""Resampling weights held at once: resamples times examples."""


def resampled_sums(features_NF: np.ndarray, metric: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A metric that is a function of sums over examples, in each of [R] resamples (the bootstrap of Efron, 1979).

    A resample only changes how often each example counts, so all resamples are one matrix product.

    Args:
        features_NF: what each of N examples adds to each of F sums.
        metric: sums [R, F] -> metric [R]; NaN where undefined.

    Returns:
        Values [R]. The generator is seeded with N: equal records give equal values on every machine, and two models'
        values for the same N examples come from the same resamples, so that their differences are paired.
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
    return np.concatenate(values)


def resampled_positions(statistic: Callable[[np.ndarray], float], examples: int) -> np.ndarray:
    """The same for a statistic of the resampled examples themselves (of ranks, say), one resample at a time."""
    generator = np.random.Generator(np.random.PCG64(examples))
    return np.asarray([statistic(generator.integers(0, examples, examples)) for _ in range(RESAMPLES)])


def interval(values: np.ndarray, *, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of resampled values, NaN if none is defined. `level`: coverage, 0.95 for 95 %."""
    if np.isnan(values).all():
        return float("nan"), float("nan")
    tail = 100 * (1 - level) / 2
    with np.errstate(invalid="ignore"):  # infinite perplexities
        low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)


def two_sided_p(differences: np.ndarray) -> float:
    """Chance of so large a difference if there were none: twice the smaller share of resamples on one side of zero.

    One resample is added to either side, so that R resamples never claim less than 2 / (R + 1).
    """
    known = differences[~np.isnan(differences)]
    smaller = min((known <= 0).sum(), (known >= 0).sum())
    return float(min(1.0, 2 * (smaller + 1) / (len(known) + 1)))


def adjusted_for_many(chances: Sequence[float]) -> list[float]:
    """p values of a family of comparisons, raised so that one false alarm in all of them is as rare as in one.

    Source: Holm, 1979, A simple sequentially rejective multiple test procedure.
    """
    order = np.argsort(chances)
    raised = [0.0] * len(chances)
    highest = 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, (len(chances) - rank) * chances[at]))
        raised[at] = highest
    return raised
