"""peftune/train.py, recorded and perhaps killed: accelerate launch benchmarks/recorded_train.py CONFIG.yaml [key=value]

What it is to do beside training stands in the variable RECORDED, as JSON (see `Order`). Each rank appends to
`<record>.<rank>.jsonl`, an object a line: the positions of the examples that it was given at each step, checkpoints
that it loaded with their checksums, one that it damaged before it began, and its end, or where it was when it was
killed.

A process of its own kills: forked before the run begins, it waits for its instant, sends SIGKILL, and then reads in
memory that both share what the run was doing. The run computes what it always does: batches are made before a step
instead of within it, and phases are noted as functions are entered.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import runpy
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

TRAIN = Path(__file__).resolve().parents[1] / "peftune" / "train.py"
PHASES = ("starting", "training", "evaluating", "saving", "ending")
"""Before the first step; steps and what is between; scores while training; checkpoints; last scores and publishing."""
LOOKING_S, SAVING_S = 0.0005, 0.02
DAMAGES = ("cut tensors", "flip a bit", "lose random", "empty manifest", "cut state")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """When to kill. Instants are drawn from the unbroken run's time and counted from the beginning of the step that it
    was in, which they do not outlast: they fall there too when the machine is faster or the run goes on from later."""

    at: Literal["any", "loop", "save", "step"]
    """any: in the whole run. loop: in its steps. save: after a checkpoint's draft appeared. step: as a step begins."""
    part: float = 0.0
    """In [0, 1): of that time, or of SAVING_S after a draft."""
    step: int = 0
    """First step, from 1, in which it may happen."""
    ranks: tuple[int, ...] = ()
    """Who dies; empty for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a run is to do beside training."""

    record: str
    attempt: int = 0
    folder: str = ""
    """The run's."""
    kill: Kill | None = None
    like: str = ""
    """Record of the unbroken run."""
    damage: int | None = None
    """Seed of a damage to the newest checkpoint, if there is one before it."""


@dataclass(slots=True)
class Whereabouts:
    """What a run does at this instant, in memory that its killer shares."""

    memory: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 8))

    def enter(self, phase: str) -> None:
        struct.pack_into("i", self.memory, 0, PHASES.index(phase))

    @property
    def phase(self) -> str:
        return PHASES[struct.unpack_from("i", self.memory, 0)[0]]

    @property
    def step(self) -> int:
        """From 1; 0 before the first, one more than there are after the last."""
        found: int = struct.unpack_from("i", self.memory, 4)[0]
        return found

    @step.setter
    def step(self, step: int) -> None:
        struct.pack_into("i", self.memory, 4, step)


def events_of(record: str, ranks: int) -> list[dict[str, Any]]:
    """All that the ranks wrote down, rank by rank, in order."""
    paths = [Path(f"{record}.{rank}.jsonl") for rank in range(ranks)]
    return [json.loads(line) for path in paths if path.is_file() for line in path.read_text("utf-8").splitlines()]


def drafts_of(folder: str) -> list[str]:
    """Checkpoints that are being written, or were when their run died."""
    return sorted(path.name for path in Path(folder, "checkpoints").glob(".step-*.draft"))


class Recorder:
    """One rank's writing down."""

    def __init__(self, order: Order) -> None:
        self.order, self.rank = order, int(os.environ.get("RANK", "0"))
        self.path = Path(f"{order.record}.{self.rank}.jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.whereabouts, self.started = Whereabouts(), time.monotonic()
        self.marks: list[tuple[int, float]] = [(0, 0.0)]
        """Steps begun and when, in seconds; 0 is the start, the last ones the end of steps and of the run."""

    def write(self, event: str, **values: Any) -> None:
        """Append a line, at once: the process may be dead at the next instant."""
        line = json.dumps({"event": event, "attempt": self.order.attempt, "rank": self.rank, **values}) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(descriptor, line.encode())
        os.close(descriptor)

    def doom(self, kill: Kill) -> None:
        """Fork the process that kills this one."""
        victim = os.getpid()
        if (kill.ranks and self.rank not in kill.ranks) or os.fork():
            return
        try:
            self._kill(victim, kill)
        finally:
            if sys.exception() is not None:
                traceback.print_exc()
            os._exit(0)  # whatever comes, the killer never goes on as the run

    def _kill(self, victim: int, kill: Kill) -> None:
        for _ in self._until(kill):
            if os.getppid() != victim:  # it has ended before its instant
                return
            time.sleep(LOOKING_S)
        os.kill(victim, signal.SIGKILL)
        while os.getppid() == victim:
            time.sleep(LOOKING_S)
        self.write("killed", at=kill.at, alone=bool(kill.ranks), phase=self.whereabouts.phase,
                   step=self.whereabouts.step, drafts=drafts_of(self.order.folder))

    def _until(self, kill: Kill) -> Iterator[None]:
        """Looks, while the instant has not come."""
        step, since, rest = kill.step, 0.0, 0.0
        if kill.at in ("any", "loop"):
            marks = next(event for event in events_of(self.order.like, 1) if event["event"] == "ended")["marks"]
            first, last = marks[0 if kill.at == "any" else 1][1], marks[-1 if kill.at == "any" else -2][1]
            step, since = next(mark for mark in reversed(marks) if mark[1] <= first + kill.part * (last - first))
            rest = first + kill.part * (last - first) - since
        while self.whereabouts.step < step:
            yield
        if kill.at == "save":
            while not drafts_of(self.order.folder):
                yield
            rest = kill.part * SAVING_S
        until, here = time.monotonic() + rest, self.whereabouts.step
        while time.monotonic() < until and self.whereabouts.step == here:
            yield

    def damage(self, seed: int) -> None:
        """Spoil the newest checkpoint, as a failing disk would."""
        checkpoints = sorted(Path(self.order.folder, "checkpoints").glob("step-*"))
        if len(checkpoints) < 2 or self.rank != 0 or Path(self.order.folder, "summary.json").exists():
            return
        newest, how = checkpoints[-1], random.Random(seed).choice(DAMAGES)
        tensors = sorted(newest.glob("tensors-*"))[-1]
        match how:
            case "cut tensors":
                os.truncate(tensors, tensors.stat().st_size // 2)
            case "flip a bit":
                content = bytearray(tensors.read_bytes())
                content[len(content) // 2] ^= 1
                tensors.write_bytes(content)
            case "lose random":
                (newest / "random.safetensors").unlink()
            case "empty manifest":
                (newest / "manifest.json").write_bytes(b"")
            case "cut state":
                os.truncate(newest / "state.json", 20)
        self.write("damaged", step=int(newest.name.removeprefix("step-")), how=how)

    def watch(self) -> None:
        """Note phases, examples and loaded checkpoints from here on."""
        import peftune.build as building
        import peftune.loop.finish as ending
        import peftune.loop.fit as loop
        from peftune.disk import sha256
        from peftune.loop.run import Run

        plain_load, plain_work, plain_finish = building.load_checkpoint, Run.work, ending.finish
        loop.save = self._within("saving", loop.save)
        loop.evaluate_and_judge = self._within("evaluating", loop.evaluate_and_judge)

        def load_checkpoint(folder: Path, *given: Any) -> Any:
            sums = {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}
            state = plain_load(folder, *given)
            self.write("loaded", step=state.step, sums=sums)
            return state

        def work(run: Run, step: int) -> Any:
            self._begin("training", step + 1)
            found = plain_work(run, step)
            batches = list(found.micro_batches)
            self.write("step", step=step + 1, positions=[at for batch in batches for at in batch.positions])
            return replace(found, micro_batches=batches)

        def finish(run: Run, state: Any) -> Any:
            self._begin("ending", state.step + 1)
            found = plain_finish(run, state)
            marks = [*self.marks, (state.step + 2, time.monotonic() - self.started)]
            self.write("ended", marks=marks)
            return found

        building.load_checkpoint, Run.work, ending.finish = load_checkpoint, work, finish

    def _begin(self, phase: str, step: int) -> None:
        self.whereabouts.enter(phase)
        self.whereabouts.step = step
        self.marks.append((step, time.monotonic() - self.started))

    def _within(self, phase: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def entered(*given: Any, **named: Any) -> Any:
            before = self.whereabouts.phase
            self.whereabouts.enter(phase)
            found = plain(*given, **named)
            self.whereabouts.enter(before)
            return found

        return entered


def main() -> None:
    """Train by the order."""
    given = json.loads(os.environ["RECORDED"])
    kill = given.pop("kill", None)
    recorder = Recorder(Order(**given, kill=Kill(**kill) if kill else None))
    if recorder.order.damage is not None:
        recorder.damage(recorder.order.damage)
    if recorder.order.kill is not None:
        recorder.doom(recorder.order.kill)
    if os.environ.get("WORLD_SIZE", "1") == "1":  # it would take a thread for each core, and here other work has these
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    recorder.watch()
    runpy.run_path(str(TRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
