"""Classification and regression scores as functions of sums over examples, for resampling.

Reported values come from scikit-learn and scipy; these twins are what makes 1,000 resamples cheap.
Shape letters: R resamples, K classes. Undefined values are NaN.
"""

from __future__ import annotations

import numpy as np


def ratio(sums_R2: np.ndarray) -> np.ndarray:
    """First sum over second: accuracy from (right, examples), loss from (nats, targets)."""
    above_R, below_R = sums_R2.T
    return np.where(below_R > 0, above_R / np.where(below_R > 0, below_R, 1), np.nan)


def split_counts(sums_RF: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums laid out as [true positives, predicted, wanted], each of K classes -> the three [R, K]."""
    true, predicted, wanted = np.split(sums_RF, 3, axis=1)
    return true, predicted, wanted


def macro_f1(sums_RF: np.ndarray) -> np.ndarray:
    """Mean of 2 tp / (predicted + wanted) over the classes that occur in prediction or reference."""
    true_RK, predicted_RK, wanted_RK = split_counts(sums_RF)
    both_RK = predicted_RK + wanted_RK
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nanmean(np.where(both_RK > 0, 2 * true_RK / both_RK, np.nan), axis=1)


def macro_f1_of_all(sums_RF: np.ndarray) -> np.ndarray:
    """The same over all classes, absent ones counting 0: scikit-learn's rule for label matrices."""
    true_RK, predicted_RK, wanted_RK = split_counts(sums_RF)
    both_RK = predicted_RK + wanted_RK
    return (2 * true_RK / np.maximum(both_RK, 1)).mean(axis=1)


def micro_f1(sums_RF: np.ndarray) -> np.ndarray:
    """2 tp / (predicted + wanted), all classes together; 0 where nothing is wanted or predicted."""
    true_R, predicted_R, wanted_R = (part.sum(axis=1) for part in split_counts(sums_RF))
    return 2 * true_R / np.maximum(predicted_R + wanted_R, 1)


def precision(sums_R3: np.ndarray) -> np.ndarray:
    """Right over predicted, from (right, predicted, wanted); 0 where nothing is predicted."""
    return sums_R3[:, 0] / np.maximum(sums_R3[:, 1], 1)


def recall(sums_R3: np.ndarray) -> np.ndarray:
    """Right over wanted, from (right, predicted, wanted); 0 where nothing is wanted."""
    return sums_R3[:, 0] / np.maximum(sums_R3[:, 2], 1)


def matthews(sums_RF: np.ndarray) -> np.ndarray:
    """Multi-class Matthews correlation (Gorodkin, 2004); 0 where one side has a single class."""
    true_RK, predicted_RK, wanted_RK = split_counts(sums_RF)
    right_R, all_R = true_RK.sum(axis=1), wanted_RK.sum(axis=1)
    covariance_R = right_R * all_R - (predicted_RK * wanted_RK).sum(axis=1)
    spread_R = (all_R**2 - (predicted_RK**2).sum(axis=1)) * (all_R**2 - (wanted_RK**2).sum(axis=1))
    return np.where(spread_R > 0, covariance_R / np.sqrt(np.maximum(spread_R, 1e-300)), 0.0)


def pearson(sums_R6: np.ndarray) -> np.ndarray:
    """Correlation from (n, sum x, sum y, sum xy, sum xx, sum yy); x and y should be centred beforehand."""
    n, x, y, xy, xx, yy = sums_R6.T
    spread_R = (n * xx - x * x) * (n * yy - y * y)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread_R > 0, (n * xy - x * y) / np.sqrt(spread_R), np.nan)
