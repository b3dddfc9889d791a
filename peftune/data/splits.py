"""A deterministic held-out part of the training rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def held_out(keys: np.ndarray, fraction: float) -> np.ndarray:
    """Which rows are held out, bool [n]: the ceil(fraction * n) with the lowest keys, and all rows of equal key.

    So a duplicate never stands on both sides, and the order of the rows does not matter.
    """
    if not len(keys):
        return np.zeros(0, dtype=bool)
    last = max(0, math.ceil(round(fraction * len(keys), 9)) - 1)
    return keys <= np.partition(keys, last)[last]


def split_key(fields: Mapping[str, Any], seed: int) -> int:
    """A hash of a row's content, below 2 ** 64."""
    content = json.dumps(dict(fields), sort_keys=True, ensure_ascii=True, default=str)
    return int.from_bytes(hashlib.sha256(f"{seed}\n{content}".encode()).digest()[:8], "big")
