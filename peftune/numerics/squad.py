"""Exact match and F1 of answers, as the official SQuAD 2.0 script computes them (Rajpurkar et al., 2018, 1806.03822).

SQuAD 1.1's script gives the same values where every question has an answer.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and repeated blanks."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 where the normalised texts are equal, else 0."""
    return float(normalised(prediction) == normalised(answer))


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over normalised words; 1 or 0 where either side has none."""
    got, want = normalised(prediction).split(), normalised(answer).split()
    if not got or not want:
        return float(got == want)
    common = sum((Counter(got) & Counter(want)).values())
    return 2 * common / (len(got) + len(want))


def best_over(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    """The best score against any of the answers; against the empty one where there is none.

    As in the official script, answers that normalise to nothing do not count.
    """
    real = [answer for answer in answers if normalised(answer)] or [""]
    return max(score(prediction, answer) for answer in real)
