"""Do runs survive? Training processes are killed with SIGKILL and started again, and moved between strategies.

    peftune bench faults [--strategies single fsdp2] [--methods full lora] [--tasks ...] [--layouts ...] [--kills 7]
                         [--chains 1-2-1 ddp-zero2-fsdp2] [--seed 0] [--to results.json]

Kills. A cell is a strategy and a task, with a method and a layout in turn: a run of eight steps with dropout, which
saves at every step and keeps two checkpoints. It is killed several times, each time started again, and at last left
alone. Instants are drawn from the seed: anywhere in the run, anywhere in its steps, or up to 20 ms after a checkpoint's
draft has appeared. Mostly all ranks die at once, sometimes one alone. Before the last start a third of the cells have
their newest checkpoint damaged. A cell is equal if the run ended and everything is bit for bit as in the same run left
alone: each row of metrics.jsonl but its times, the examples of each step, the weights in `final` and `best`, the
scores; if the tensors of each checkpoint that was loaded are those that the unbroken run wrote at that step; and if a
damaged one was named and passed over.

Chains. A run of each task, without dropout, is killed and goes on under another strategy and number of processes, in
its own folder, several times. Reported is whether each step saw the examples that it sees in one process, and how far
its loss lies from that, relatively.

Runs share launches (many_runs.py). recorded_train.py kills, and writes down what the processes did.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, Literal

import torch

from benchmarks.chains import CHAINS, TOLERANCE, Moved, chain_and_compare
from benchmarks.parity import Asked, Bench, Cell, processes_of
from benchmarks.recorded_runs import STEPS, order_of, recorded, said_at_end
from benchmarks.recorded_train import Kill, events_of
from benchmarks.same_runs import examples_of, rows_of, same_weights, scores_of
from peftune.disk import sha256
from peftune.loop.checkpoint import folder_of
from peftune.observe.manifest import environment
from peftune.parallel.names import STRATEGIES
from peftune.tasks import TASKS
from peftune.tasks.text import quiet_libraries

METHODS = ("lora", "full")
LAYOUTS = ("packed, several", "padded, several")
INSTANTS: tuple[Literal["any", "loop", "save"], ...] = ("any", "loop", "save")
ALONE, DAMAGED = 0.2, 1 / 3
"""Parts of the kills of several processes that hit one rank alone; of the cells whose newest checkpoint is damaged."""


@dataclass(frozen=True, slots=True)
class Survived:
    """What became of a cell that was killed."""

    equal: bool
    why: list[str]
    asynchronous: bool
    kills: list[dict[str, Any]]
    loaded: list[int]
    """Step of each checkpoint that a start went on from."""
    damaged: list[dict[str, Any]]
    missed: int
    """Starts that ended before the instant at which they were to be killed."""
    commit: str = ""


def cells_of(strategy: str, tasks: Sequence[str], methods: Sequence[str], layouts: Sequence[str]) -> list[Cell]:
    """Each task, with methods and layouts in turn: a strategy meets every pair of these."""
    first = list(STRATEGIES).index(strategy)
    return [Cell(strategy, methods[(first + i) % len(methods)], task, layouts[(first + i) // 2 % len(layouts)])
            for i, task in enumerate(tasks)]


def starts_of(bench: Bench, cell: Cell, number: int, kills: int, seed: int) -> list[Asked]:
    """The unbroken run of a cell, then the starts of the one that is killed; the last is left alone."""
    drawn = random.Random(f"{seed} {cell}")
    name = str(cell).replace(" / ", "-").replace(", ", "-").replace(" ", "-")
    overrides = ["model.dropout=0.1", f"checkpoint.asynchronous={str(drawn.random() < 0.5).lower()}"]
    overrides += ["adapter.lora_dropout=0.1"] if cell.method == "lora" else []
    unbroken = recorded(bench, cell, f"{name}-unbroken", [*overrides, "checkpoint.keep=99"])
    ranks, starts = processes_of(cell.strategy), [unbroken]
    for attempt, kill in enumerate([*_kills(drawn, number, kills, ranks), None]):
        damaged = kill is None and drawn.random() < DAMAGED
        starts.append(recorded(bench, cell, f"{name}-killed", [*overrides, "checkpoint.keep=2"], attempt=attempt,
                             kill=kill, like=order_of(unbroken)["record"],
                             damage=drawn.randrange(2**31) if damaged else None))
    return starts


def _kills(drawn: random.Random, number: int, kills: int, ranks: int) -> list[Kill]:
    """Each kind in turn, sorted by how far the run will have come: a late one would leave others nothing to kill."""
    made = []
    for i in range(kills):
        alone = (drawn.randrange(ranks),) if drawn.random() < ALONE and ranks > 1 else ()
        made.append(Kill(at=INSTANTS[(number + i) % len(INSTANTS)], part=drawn.random(), ranks=alone,
                         step=drawn.randrange(1, STEPS)))
    return sorted(made, key=lambda kill: kill.step / STEPS if kill.at == "save" else kill.part)


def kill_and_compare(bench: Bench, cells: Sequence[Cell], kills: int, seed: int) -> dict[Cell, Survived]:
    """Run cells, killed and unbroken."""
    starts = {cell: starts_of(bench, cell, number, kills, seed) for number, cell in enumerate(cells)}
    ended = bench.run([one for group in starts.values() for one in group])
    return {cell: survived(bench, group, ended) for cell, group in starts.items()}


def survived(bench: Bench, starts: Sequence[Asked], ended: Mapping[Asked, CompletedProcess[str]]) -> Survived:
    """Compare a run that was killed with the unbroken one."""
    unbroken, *killed = starts
    ranks, (run, twin) = processes_of(unbroken.cell.strategy), map(bench.run_folder, (killed[-1], unbroken))
    events, theirs = (events_of(order_of(one)["record"], ranks) for one in (killed[-1], unbroken))
    kills, loaded, damaged = ([event for event in events if event["event"] == kind]
                              for kind in ("killed", "loaded", "damaged"))
    why = [said_at_end(ended[one]) for one in (unbroken, killed[-1]) if ended[one].returncode]
    if not why:
        why += [f"{what} differ" for what, same in {
            "rows": rows_of(run) == rows_of(twin), "examples": examples_of(events) == examples_of(theirs),
            "scores": scores_of(run) == scores_of(twin), "weights": same_weights(run, twin)}.items() if not same]
    for event in loaded:
        files = sorted(folder_of(twin, event["step"]).glob("*.safetensors"))
        if event["sums"] != {file.name: sha256(file) for file in files}:
            why.append(f"checkpoint {event['step']} was loaded with other content than the unbroken run wrote")
    for event in damaged:
        started = [other["step"] for other in loaded if other["attempt"] == event["attempt"]]
        said = " ".join(ended[killed[event["attempt"]]].stdout.split())
        if "damaged checkpoint" not in said or not started or max(started) >= event["step"]:
            why.append(f"damaged checkpoint {event['step']} was not passed over loudly: {said[-500:]}")
    reached = {event["attempt"] for event in kills}
    return Survived(
        equal=not why, why=why, asynchronous="checkpoint.asynchronous=true" in unbroken.overrides,
        kills=[{key: value for key, value in event.items() if key != "event"} for event in kills],
        loaded=[event["step"] for event in loaded if event["rank"] == 0],
        damaged=[{key: event[key] for key in ("step", "how")} for event in damaged],
        missed=len(killed) - 1 - len(reached))


def totals_of(results: Mapping[Cell, Survived]) -> dict[str, Any]:
    """What the cells come to."""
    kills = [kill for one in results.values() for kill in one.kills]
    return {
        "cells": len(results), "equal": sum(one.equal for one in results.values()), "kills": len(_deaths(results)),
        "processes_killed": len(kills), "of_one_rank_alone": sum(kill["alone"] for kill in kills),
        "by_phase": dict(Counter(kill["phase"] for kill in _deaths(results)).most_common()),
        "with_a_partial_checkpoint_on_disk": sum(bool(kill["drafts"]) for kill in _deaths(results)),
        "checkpoints_loaded": sum(len(one.loaded) for one in results.values()),
        "damaged_and_passed_over": dict(Counter(event["how"] for one in results.values() for event in one.damaged)),
        "ended_before_their_instant": sum(one.missed for one in results.values())}


def _deaths(results: Mapping[Cell, Survived]) -> list[dict[str, Any]]:
    """One kill a start, however many ranks died: where its lowest rank was."""
    return list({(cell, kill["attempt"]): kill for cell, one in results.items()
                 for kill in sorted(one.kills, key=lambda kill: -int(kill["rank"]))}.values())


def _earlier(path: Path | None) -> tuple[dict[Cell, Survived], dict[tuple[str, Cell], Moved]]:
    if path is None or not path.is_file():
        return {}, {}
    found, keys = json.loads(path.read_text(encoding="utf-8")), ("strategy", "method", "task", "layout")

    def parts(one: dict[str, Any]) -> tuple[Cell, dict[str, Any]]:
        return Cell(*(one[key] for key in keys)), {name: one[name] for name in one if name not in (*keys, "chain")}

    kills = {cell: Survived(**values) for cell, values in map(parts, found["kills"])}
    return kills, {(one["chain"], parts(one)[0]): Moved(**parts(one)[1]) for one in found["chains"]}


def _write(path: Path | None, kills: Mapping[Cell, Survived], chains: Mapping[tuple[str, Cell], Moved]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({
        **environment(torch.device("cpu")), "steps": STEPS, "processes": 2, "totals": totals_of(kills),
        "by_strategy": {strategy: totals_of(some) for strategy in STRATEGIES
                        if (some := {cell: one for cell, one in kills.items() if cell.strategy == strategy})},
        "largest_loss_deviation": {name: max(some) for name in CHAINS if (
            some := [one.loss_deviation for (chain, _), one in chains.items() if chain == name])},
        "same_examples_at_every_step": all(one.same_examples for one in chains.values()),
        "chains": [{"chain": chain, **asdict(cell), **asdict(one)} for (chain, cell), one in chains.items()],
        "kills": [{**asdict(cell), **asdict(one)} for cell, one in kills.items()]}, indent=1) + "\n")


def main() -> int:
    """Run what is asked for, write what was found after each strategy, and say whether any is unequal."""
    parser = argparse.ArgumentParser(prog="peftune bench faults", description=__doc__.splitlines()[0])
    for name, choices in (("strategies", STRATEGIES), ("methods", METHODS), ("tasks", TASKS), ("layouts", LAYOUTS),
                          ("chains", CHAINS)):
        parser.add_argument(f"--{name}", nargs="*", choices=list(choices), default=list(choices), metavar=name.upper())
    parser.add_argument("--kills", type=int, default=7, help="of each cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, help="results; those that are there already and not made now stay")
    asked = parser.parse_args()
    quiet_libraries()
    kills, chains = _earlier(asked.to)
    commit = environment(torch.device("cpu"))["commit"]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("PEFTUNE_CACHE", f"{scratch}/cache")
        bench = Bench(Path(scratch) / "bench")
        for strategy in asked.strategies:
            cells = cells_of(strategy, asked.tasks, asked.methods, asked.layouts)
            found = kill_and_compare(bench, cells, asked.kills, asked.seed)
            kills |= {cell: replace(one, commit=commit) for cell, one in found.items()}
            print(strategy, json.dumps(totals_of(found)), flush=True)
            for cell, one in found.items():
                print(*(f"  {cell}: {why}" for why in one.why), sep="\n", end="", flush=True)
            _write(asked.to, kills, chains)
        cells = cells_of("single", asked.tasks, asked.methods, asked.layouts)
        for (chain, cell), one in chain_and_compare(bench, asked.chains, cells).items():
            chains[chain, cell] = replace(one, commit=commit)
            print(chain, cell, one, flush=True)
        _write(asked.to, kills, chains)
    red = sum(not one.equal for one in kills.values())
    red += sum(not one.same_examples or one.loss_deviation > TOLERANCE for one in chains.values())
    print(json.dumps(totals_of(kills)), f"{red} red", sep="\n")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
