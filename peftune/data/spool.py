"""Canonical rows on disk between reading and tokenising, so that memory does not grow with the data."""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from peftune.config.schema import DataConfig, Source
from peftune.data.formats import Found, canonical_rows, useless_renames
from peftune.data.rows import Row
from peftune.data.sources import as_sources, read
from peftune.data.splits import held_out, split_key
from peftune.errors import DataError, Fault

SPLITS = ("train", "validation", "test")
TOLD_ROWS = 10_000
Progress = Callable[[str, int, int], None]
"""What is done, how much of it, and of how much: 0 where that is not known."""


@dataclass(frozen=True, slots=True)
class Spool:
    """The rows of a split, a JSON line each."""

    path: Path
    rows: int
    bad: int
    """Records that were left out."""

    def read(self, begin: int = 0, end: int | None = None) -> Iterator[Row]:
        """Rows whose line begins in bytes [begin, end) of the file; without bounds all."""
        with self.path.open("rb") as stream:
            if begin:
                stream.seek(begin - 1)
                stream.readline()  # the rest of the line before, which belongs to another reader
            while end is None or stream.tell() < end:
                line = stream.readline()
                if not line:
                    return
                yield Row(**json.loads(line))

    def parts(self, count: int) -> list[tuple[int, int]]:
        """Byte ranges of nearly equal size that together hold each row once."""
        size = self.path.stat().st_size
        borders = [size * part // count for part in range(count + 1)]
        return list(itertools.pairwise(borders))


def needed_sources(config: DataConfig, only: Sequence[str]) -> dict[str, tuple[Source, ...]]:
    """The sources that must be read for the splits `only`, by the split whose files they are."""
    holds_validation = isinstance(config.validation, float) and "validation" in only
    sources = {}
    if "train" in only or holds_validation:
        sources["train"] = as_sources(config.train)
    if "validation" in only and config.validation is not None and not isinstance(config.validation, float):
        sources["validation"] = as_sources(config.validation)
    if "test" in only and config.test is not None:
        sources["test"] = as_sources(config.test)
    return sources


def spool_rows(
    config: DataConfig, formats: tuple[str, ...], seed: int, only: Sequence[str], folder: Path,
    progress: Progress = lambda what, done, total: None,
) -> tuple[dict[str, Spool], Found]:
    """Read every source once and write its good rows by split; bad ones are in what is found.

    `progress` hears of the good rows of a split, now and then; how many there will be nobody knows.

    Raises:
        DataError: a source that is not there or fits no format, or a column to rename that no row has, along with the
            bad rows of all others.
    """
    found = Found()
    spools: dict[str, Spool] = {}
    broken: list[Fault] = []
    for name, sources in needed_sources(config, only).items():
        before = found.faults.count
        keys, numbers = array("Q"), itertools.count()
        path = folder / f"{name}.rows"
        with path.open("w", encoding="utf-8") as stream:
            for number, source in enumerate(sources):
                try:
                    for row in canonical_rows(
                            read(source, found.faults), format=config.format, accepts=formats, columns=config.columns,
                            source=number, numbers=numbers, found=found):
                        stream.write(json.dumps(asdict(row), ensure_ascii=False, default=str) + "\n")
                        keys.append(split_key(row.fields, seed) if isinstance(config.validation, float) else 0)
                        if len(keys) % TOLD_ROWS == 0:
                            progress(f"{name} rows read", len(keys), 0)
                except DataError as error:
                    broken += error.faults
        spools[name] = Spool(path, len(keys), found.faults.count - before)
        if name == "train" and isinstance(config.validation, float) and "validation" in only:
            spools |= _divide(spools["train"], held_out(np.asarray(keys), config.validation))
    if not broken and set(only) == set(SPLITS):  # some of the files may need no renaming
        broken = useless_renames(config.columns, found)
    if broken:
        raise DataError([*broken, *found.faults.kept])
    return {name: spools[name] for name in SPLITS if name in spools and name in only}, found


def _divide(spool: Spool, held: np.ndarray) -> dict[str, Spool]:
    """Move the held-out rows of the training spool into one of their own."""
    whole = spool.path.rename(spool.path.with_name("all.rows"))
    validation = spool.path.with_name("validation.rows")
    with whole.open("rb") as stream, spool.path.open("wb") as kept, validation.open("wb") as out:
        for line, is_held in zip(stream, held, strict=True):
            (out if is_held else kept).write(line)
    whole.unlink()
    return {"train": Spool(spool.path, int((~held).sum()), spool.bad),
            "validation": Spool(validation, int(held.sum()), 0)}
