"""Rows -> tokenised examples in Arrow files, in this process or, for many rows, in several."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

from peftune.config.schema import DataConfig
from peftune.containers import cores
from peftune.data.examples import Example
from peftune.data.findings import SHOWN_PLACES, Doubt, Place
from peftune.data.rows import Faults, Row
from peftune.data.spool import Spool
from peftune.data.store import write
from peftune.data.targets import RowFault, Targets
from peftune.errors import Fault

PARALLEL_FROM_ROWS = 30_000
"""Fewer rows are tokenised before other processes have started."""
MOST_PROCESSES = 16
PARTS_PER_PROCESS = 4


class RowEncoder(Protocol):
    """A task's view of the data, as `tasks/` gives it. It is sent to other processes."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Row formats the task can learn from."""
        ...

    @property
    def surveyed_as(self) -> str:
        """How `survey.py` looks at its rows."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens an example may have."""
        ...

    @property
    def scores_every_row(self) -> bool:
        """Whether rows without a target stay in the splits that are scored."""
        ...

    def targets(self, rows: Iterable[Row], config: DataConfig) -> Targets: ...
    def doubt(self, row: Row) -> Doubt | None: ...
    def encode(self, row: Row, targets: Targets) -> Sequence[Example]: ...


@dataclass(slots=True)
class Counts:
    """What became of the rows of a split. rows = kept + bad + dropped_too_long + dropped_no_target."""

    rows: int = 0
    kept: int = 0
    bad: int = 0
    truncated: int = 0
    dropped_too_long: int = 0
    dropped_no_target: int = 0
    examples: int = 0
    """Of the rows kept: more where long ones make several."""
    tokens: int = 0
    supervised_targets: int = 0
    longest: int = 0

    def add(self, other: Counts) -> None:
        """Add another part's counts."""
        longest = max(self.longest, other.longest)
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))  # every count alike
        self.longest = longest


@dataclass(slots=True)
class Outcome:
    """What tokenising a part of a split has shown."""

    counts: Counts = field(default_factory=Counts)
    faults: Faults = field(default_factory=Faults)
    too_long: list[tuple[int, Place]] = field(default_factory=list)
    """The longest rows that were cut or dropped for their length, and their tokens."""
    no_target: list[Place] = field(default_factory=list)
    """The first rows that were dropped because nothing of them is to be learned."""

    def add(self, other: Outcome) -> None:
        """Add the outcome of the part that follows."""
        self.counts.add(other.counts)
        self.faults.add_all(other.faults.kept)
        self.faults.count += other.faults.count - len(other.faults.kept)
        self.too_long = longest(self.too_long + other.too_long)
        self.no_target += other.no_target[: SHOWN_PLACES - len(self.no_target)]


@dataclass(frozen=True, slots=True)
class Work:
    """A split to tokenise."""

    name: str
    spool: Spool
    encoder: RowEncoder
    targets: Targets
    config: DataConfig
    folder: Path


def tokenise(
    works: Sequence[Work], meanwhile: Callable[[], None], progress: Callable[[str, int, int], None]
) -> dict[str, Outcome]:
    """Tokenise splits into `folder/<split>-<part>.arrow`; the order of the rows is kept.

    Args:
        works: the splits.
        meanwhile: what this process does while others tokenise; before it tokenises itself, where rows are few.
        progress: told of each part that another process has done, from a thread: what is done, parts, and all parts.
    """
    processes = min(MOST_PROCESSES, cores())
    if processes < 2 or sum(work.spool.rows for work in works) < PARALLEL_FROM_ROWS:
        meanwhile()
        return {work.name: _part(work, 0, 0, None) for work in works}
    futures: dict[str, list[Future[Outcome]]] = {}
    # a fresh interpreter each: this one holds threads, which a fork would lose
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for work in works:
            futures[work.name] = [pool.submit(_part, work, number, begin, end) for number, (begin, end)
                                  in enumerate(work.spool.parts(processes * PARTS_PER_PROCESS))]
        submitted = list(itertools.chain.from_iterable(futures.values()))
        for future in submitted:
            future.add_done_callback(lambda _: progress("tokenised", sum(map(Future.done, submitted)), len(submitted)))
        meanwhile()
        outcomes = {}
        for name, parts in futures.items():
            outcomes[name] = Outcome()
            for part in parts:
                outcomes[name].add(part.result())
    return outcomes


def _part(work: Work, number: int, begin: int, end: int | None) -> Outcome:
    outcome = Outcome()
    write(work.folder / f"{work.name}-{number:05d}.arrow", _examples(work, begin, end, outcome), work.targets.kind)
    return outcome


def _examples(work: Work, begin: int, end: int | None, outcome: Outcome) -> Iterator[Example]:
    """Encode rows one by one; count what is cut or dropped, collect what is wrong."""
    counts, config = outcome.counts, work.config
    unlearned = work.encoder.scores_every_row and work.name != "train"
    for row in work.spool.read(begin, end):
        counts.rows += 1
        try:
            examples = work.encoder.encode(row, work.targets)
        except RowFault as error:
            counts.bad += 1
            outcome.faults.add(Fault(kind="data", file=row.file, line=row.line, message=error.message, mend=error.mend))
            continue
        full_length = max(example.full_length for example in examples)
        counts.longest = max(counts.longest, full_length)
        too_long = full_length > work.encoder.max_length
        if too_long:
            outcome.too_long.append((full_length, Place(row.file, row.line, f"{full_length:,} tokens")))
            if len(outcome.too_long) > 2 * SHOWN_PLACES:
                outcome.too_long = longest(outcome.too_long)
        if too_long and config.too_long == "error":
            counts.bad += 1
            outcome.faults.add(Fault(
                kind="data", file=row.file, line=row.line,
                message=f"{full_length} tokens are more than data.max_length = {work.encoder.max_length}",
                mend=f"data.max_length={full_length} or more, or data.too_long=truncate or drop"))
        elif too_long and config.too_long == "drop":
            counts.dropped_too_long += 1
        else:
            usable = [example for example in examples if example.num_targets or unlearned]
            if usable:
                counts.kept += 1
                counts.truncated += too_long
            else:
                counts.dropped_no_target += 1
                _note(outcome.no_target, row, "nothing of it is to be learned" + " once it is cut" * too_long)
            for example in usable:
                counts.examples += 1
                counts.tokens += len(example.input_ids)
                counts.supervised_targets += example.num_targets
                yield example


def _note(places: list[Place], row: Row, message: str) -> None:
    if len(places) < SHOWN_PLACES:
        places.append(Place(row.file, row.line, message))


def longest(places: list[tuple[int, Place]]) -> list[tuple[int, Place]]:
    """The longest ones, the longest first, in file order where equal."""
    return sorted(places, key=lambda known: -known[0])[:SHOWN_PLACES]
