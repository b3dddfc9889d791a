"""Where a process's main thread stands, for the threads that watch it. Marking costs the step next to nothing."""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

PACKAGE = str(Path(__file__).resolve().parents[1])
EXCHANGES = ("/torch/distributed/", "/deepspeed/comm/", "/deepspeed/runtime/zero/")
"""Code in which a process waits for others; and in a backward pass, which hands gradients over."""
WORKING_SHARE = 0.01
"""Of a processor, at least, uses a process that computes."""


@dataclass(slots=True)
class Progress:
    """What the main thread is doing, and when it last came further. It alone writes here."""

    doing: str = "starting"
    """In words that follow the name of a rank: `in step 5`."""
    steady: bool = False
    """What is being done marks its progress again and again. If not, a rank comes further as long as it works."""
    waiting: bool = False
    """For the others, in an exchange."""
    marks: int = 0
    """Equal on ranks that stand at the same place: everything that counts is done by all of them."""
    warm: bool = False
    """Nothing is steady in the first step and before: kernels are built and compiled."""
    ending: bool = False
    """This process is about to end; why is settled."""
    moved_s: float = field(default_factory=time.monotonic)

    def at(self, doing: str, *, steady: bool = False) -> None:
        """Begin something, as all ranks do. `steady`: `step` or `tick` will be called within it, again and again."""
        self.doing, self.steady = doing, steady and self.warm
        self.step()

    def step(self) -> None:
        """One piece of it more, of which all ranks have as many."""
        self.marks += 1
        self.tick()

    def tick(self) -> None:
        """A sign of life, as often as this rank likes."""
        self.moved_s = time.monotonic()

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """Around what waits for the other ranks."""
        self.step()
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False
            self.tick()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Around what the others wait for: it may take long, as long as it works."""
        steady, self.steady = self.steady, False
        try:
            yield
        finally:
            self.steady = steady
            self.tick()


class Activity:
    """Whether this process and those it has started work: compute, or read or write a disk.

    One thread asks, whose own work does not count.
    """

    def __init__(self) -> None:
        self._last = self._read()

    def since_asked(self) -> bool:
        """Whether they have worked since this was asked last."""
        last, self._last = self._last, self._read()
        return self._last[1] - last[1] > WORKING_SHARE * (self._last[0] - last[0]) or self._last[2] > last[2]

    @staticmethod
    def _read() -> tuple[float, float, int]:
        """Time; processor time, both in seconds; blocks moved and pages fetched."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        computed = used.ru_utime + used.ru_stime - time.thread_time()
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                computed += sum(child.cpu_times()[:2])
        return time.monotonic(), computed, used.ru_inblock + used.ru_oublock + used.ru_majflt


def place_of_main_thread() -> tuple[str, bool]:
    """Where the main thread stands, file and line in this package and beneath it, and whether in an exchange."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    deepest, ours, exchanging = "", "", False
    while frame is not None:
        file, here = frame.f_code.co_filename, f"{frame.f_code.co_filename}:{frame.f_lineno}"
        deepest = deepest or here
        if file.startswith(PACKAGE) and not ours:
            ours = here
        exchanging |= any(part in file for part in EXCHANGES) or frame.f_code.co_name == "_engine_run_backward"
        frame = frame.f_back
    return (deepest if ours in ("", deepest) else f"{ours}, in {deepest}"), exchanging
