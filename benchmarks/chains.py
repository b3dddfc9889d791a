"""Runs that go on under other strategies and numbers of processes, beside one process; for `faults.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from subprocess import CompletedProcess

from benchmarks.parity import Asked, Bench, Cell
from benchmarks.recorded_runs import STEPS, order_of, recorded, said_at_end
from benchmarks.recorded_train import Kill, events_of
from benchmarks.same_runs import examples_of, rows_of

CHAINS = {"1-2-1": ("single", "ddp", "single"), "ddp-zero2-fsdp2": ("ddp", "zero2", "fsdp2", "single")}
TOLERANCE = 1e-5
"""Largest relative deviation of a loss that counts as equal in a chain: ranks sum float32 in another order."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What became of a run under several strategies."""

    legs: list[str]
    """Strategy of each step."""
    same_examples: bool
    loss_deviation: float
    """Largest over all steps, relative to one process."""
    why: list[str] = field(default_factory=list)
    commit: str = ""


def chain_and_compare(bench: Bench, chains: Sequence[str], cells: Sequence[Cell]) -> dict[tuple[str, Cell], Moved]:
    """Run cells (whose strategy is `single`) under each chain of strategies."""
    references = [recorded(bench, cell, f"reference-{i}", []) for i, cell in enumerate(cells)]
    legs: dict[tuple[str, Cell], list[Asked]] = {}
    for chain in chains:
        strategies = CHAINS[chain]
        for i, cell in enumerate(cells):
            legs[chain, cell] = []
            for leg, strategy in enumerate(strategies):
                border = STEPS * (leg + 1) // len(strategies)
                legs[chain, cell].append(recorded(
                    bench, Cell(strategy, cell.method, cell.task, cell.layout), f"chain-{chain}-{i}", [], attempt=leg,
                    kill=None if leg == len(strategies) - 1 else Kill(at="step", step=border + 1)))
    ended = bench.run(references)
    for leg in range(max((len(CHAINS[chain]) for chain in chains), default=0)):
        ended |= bench.run([asked[leg] for asked in legs.values() if leg < len(asked)])
    return {key: moved(bench, references[cells.index(key[1])], asked, ended) for key, asked in legs.items()}


def moved(
    bench: Bench, reference: Asked, legs: Sequence[Asked], ended: Mapping[Asked, CompletedProcess[str]]
) -> Moved:
    """Compare a run under several strategies with one process."""
    bad = [said_at_end(ended[one]) for one in (reference, legs[-1]) if ended[one].returncode]
    if bad:
        return Moved([], False, float("inf"), bad)
    events = events_of(order_of(legs[-1])["record"], 2)
    under = {event["step"]: event["attempt"] for event in sorted(
        (event for event in events if event["event"] == "step"), key=lambda event: int(event["attempt"]))}
    losses, theirs = ({row["step"]: row["loss"] for row in rows_of(bench.run_folder(one)) if row["split"] == "train"}
                      for one in (legs[-1], reference))
    same = examples_of(events) == examples_of(events_of(order_of(reference)["record"], 1))
    return Moved([legs[attempt].cell.strategy for _, attempt in sorted(under.items())],
                 same and losses.keys() == theirs.keys() and len(losses) == STEPS,
                 max(abs(losses[step] - theirs[step]) / abs(theirs[step]) for step in theirs if step in losses))
