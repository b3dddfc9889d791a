"""A deterministic held-out part of the training rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

from peftune.data.rows import Row


def split_off(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Divide rows into (kept, held out) by the hash of their content.

    The ceil(fraction * n) rows with the lowest hash are held out, and with them every row of equal
    content: a duplicate never stands on both sides. Does not depend on the order of the rows.
    """
    keys = [_key(row, seed) for row in rows]
    border = sorted(keys)[max(0, math.ceil(fraction * len(rows)) - 1)] if rows else ""
    kept = [row for row, key in zip(rows, keys, strict=True) if key > border]
    held_out = [row for row, key in zip(rows, keys, strict=True) if key <= border]
    return kept, held_out


def _key(row: Row, seed: int) -> str:
    content = json.dumps(dict(row.fields), sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(f"{seed}\n{content}".encode()).hexdigest()
