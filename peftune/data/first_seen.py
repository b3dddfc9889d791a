"""Which row had a hash first, in 16 bytes a row."""

from __future__ import annotations

import numpy as np

RECENT = 1 << 16
"""Hashes that are held in a dict, at ten times the bytes, before they join the sorted ones."""


class FirstSeen:
    """Hash of 64 bits -> the number of the first row that had it."""

    def __init__(self) -> None:
        self._recent: dict[int, int] = {}
        self._hashes = np.empty(0, np.uint64)
        self._rows = np.empty(0, np.uint64)

    def row_of(self, key: int, row: int) -> int:
        """The first row with this key: `row` itself if there was none before."""
        known = self._recent.get(key)
        if known is None:
            known = self._sorted_row(key)
        if known is not None:
            return known
        self._recent[key] = row
        if len(self._recent) == RECENT:
            self._merge()
        return row

    def _sorted_row(self, key: int) -> int | None:
        at = int(self._hashes.searchsorted(np.uint64(key)))
        return int(self._rows[at]) if at < len(self._hashes) and int(self._hashes[at]) == key else None

    def _merge(self) -> None:
        hashes = np.concatenate([self._hashes, np.fromiter(self._recent, np.uint64, len(self._recent))])
        rows = np.concatenate([self._rows, np.fromiter(self._recent.values(), np.uint64, len(self._recent))])
        order = np.argsort(hashes)
        self._hashes, self._rows = hashes[order], rows[order]
        self._recent.clear()
