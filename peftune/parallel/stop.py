"""Told to stop: signals and a time limit, noted by each process and obeyed by all of them together.

Imports no torch: train.py listens before anything heavy is loaded.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from peftune.errors import EXIT_CODE_FILE, EXIT_OUR_FAULT, EXIT_PREEMPTED, report_exit_code, say
from peftune.parallel.posts import born

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST_S = 2.0
"""One request may come several times at once: from the terminal, from the launcher, from the cluster."""
ENDING_S = 5.0
"""Time before a deadline that is left for the processes to end."""
STARTED = "PEFTUNE_STARTED"
"""Environment variable: when the command began, in seconds since 1970. Processes that torchrun restarts inherit it."""


class StopAgreed(Exception):
    """All ranks have agreed to stop, in the middle of something that a later start does again."""


@dataclass(slots=True)
class Stop:
    """Whether this process has been told to stop, or its time is up. One that nobody tells never is.

    Before `wait_for_steps`, a signal ends the process at once: there is nothing to save.
    """

    signal: int | None = None
    waiting: bool = False
    deadline: float | None = None
    """Seconds since 1970."""
    saving_s: float | None = None
    """Longest time that a checkpoint has taken so far; None before the first."""
    late: bool = False
    """Whether more work was once found not to end before the deadline."""
    before: Callable[[], None] = lambda: None
    """Called first when a signal comes: it may be a consequence of another rank's end."""

    def wait_for_steps(self, deadline_s: float | None) -> None:
        """From here on the loop obeys, between two steps.

        Args:
            deadline_s: seconds from the command's start to the time at which the process must have ended.
        """
        if deadline_s is not None:
            self.deadline = float(os.environ.get(STARTED, time.time())) + deadline_s
        self.waiting = True

    def asked(self, next_s: float = 0.0) -> bool:
        """Whether to stop now rather than after another `next_s` seconds of work, saving included."""
        if self.deadline is not None:
            self.late |= time.time() + next_s + (self.saving_s or 0.0) + ENDING_S >= self.deadline
        return self.waiting and (self.signal is not None or self.late)

    def reason(self) -> str:
        """Why, in words; empty if not told."""
        if self.signal is not None:
            return f"{signal.Signals(self.signal).name} came"
        return "the deadline is near" if self.late else ""

    def saved_in(self, seconds: float) -> None:
        """Note how long a checkpoint took, if one was written: that much time is left for the last one."""
        if seconds:
            self.saving_s = max(seconds, self.saving_s or 0.0)

    @property
    def must_measure(self) -> bool:
        """Whether a deadline needs a first checkpoint, to know how long one takes."""
        return self.deadline is not None and self.saving_s is None

    def tell(self, number: int) -> None:
        """Take one request that is not a repetition of the last."""
        name = signal.Signals(number).name
        self.before()
        if self.signal is not None:
            _leave(f"stopped at once by a second signal, {name}: the steps since the last checkpoint are lost",
                   128 + number)
        if not self.waiting and _another_has_died():
            _leave(f"{name} came before the first step, since another process of this run has died: its own output "
                   "says why", EXIT_OUR_FAULT)
        if not self.waiting:
            _leave(f"stopped by {name} before the first step: nothing was to be saved. Start the same command again",
                   EXIT_PREEMPTED)
        self.signal = number
        say(f"{name}: saving after this step; a second signal stops at once")


def listen() -> Stop:
    """Note the signals of SIGNALS from now on.

    A thread reads what C's handler writes into a pipe: so a signal is heard even while the main thread waits for
    other ranks inside a library. Signals that the caller has set to be ignored stay so. Processes forked from this
    one do not listen.
    """
    stop = Stop()
    os.environ.setdefault(STARTED, str(time.time()))
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)
            signal.siginterrupt(number, False)
    os.register_at_fork(after_in_child=_stop_listening)
    threading.Thread(target=_hear, args=(stop, read), daemon=True, name="signals").start()
    if EXIT_CODE_FILE in os.environ:
        _own_file().touch()  # for `peftune train` to pass signals on to
    return stop


def listening(report: Path) -> list[int]:
    """Processes of this machine that `peftune train` has launched, and that have listened and not left since.

    `report`: what EXIT_CODE_FILE names.
    """
    return [int(file.suffix[1:]) for file in report.parent.glob(f"{report.name}.*")]


def _own_file() -> Path:
    return Path(f"{os.environ[EXIT_CODE_FILE]}.{os.getpid()}")


def _another_has_died() -> bool:
    """Whether one of them is gone: a launcher then tells the others to end, which is no wish to stop the run."""
    return EXIT_CODE_FILE in os.environ and None in map(born, listening(Path(os.environ[EXIT_CODE_FILE])))


def _hear(stop: Stop, pipe: int) -> None:
    last = -SAME_REQUEST_S
    while True:
        number = os.read(pipe, 1)[0]
        if number in SIGNALS and time.monotonic() - last >= SAME_REQUEST_S:
            last = time.monotonic()
            stop.tell(number)


def _stop_listening() -> None:
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _leave(message: str, code: int) -> NoReturn:
    """End this process from any thread, and the workers it has started."""
    say(message)
    for child in multiprocessing.active_children():
        child.kill()
    if EXIT_CODE_FILE in os.environ:
        _own_file().unlink(missing_ok=True)
    reported = report_exit_code(code)
    os._exit(reported if int(os.environ.get("WORLD_SIZE", "1")) == 1 else code)
