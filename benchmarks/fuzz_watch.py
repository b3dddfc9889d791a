"""One fuzzed act, watched: how it ended, and whether it wrote, ran or loaded what it must not."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftune.errors import PeftuneError

LIMIT_S = 30
"""A case that runs longer hangs."""
PACKAGE = str(Path(__file__).resolve().parents[1] / "peftune")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.mkdir": 0,
    "os.rename": 1,
    "os.remove": 0,
    "os.rmdir": 0,
    "os.link": 1,
    "os.symlink": 1,
    "os.truncate": 0,
    "shutil.rmtree": 0,
}
"""Audit events that change a file system -> which argument names what is changed."""
FORBIDDEN = (
    "pickle.find_class",
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
)


class Hang(BaseException):
    """Not an Exception: nothing on the way may catch it."""


@dataclass(slots=True)
class Watch:
    """Which folders may be written to, and what was done beyond that."""

    allowed: tuple[str, ...] = ()
    on: bool = False
    wrong: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The hook of `sys.addaudithook`, which nobody can take off again."""
        if not self.on:
            return
        if event in FORBIDDEN:
            self.wrong.append(f"{event} {arguments!r:.200}")
        elif event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and isinstance(flags, int) and flags & WRITES:
                self._changed(event, path)
        elif event in CHANGES and not any(isinstance(folder, int) and folder >= 0 for folder in arguments[1:]):
            # names relative to an open folder come from rmtree alone, which says the folder's own name too
            self._changed(event, arguments[CHANGES[event]])

    def _changed(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        name = os.path.realpath(os.fsdecode(path))
        if name != os.devnull and not name.startswith(self.allowed) and "__pycache__" not in name:
            self.wrong.append(f"{event} {name}")


WATCH = Watch()
sys.addaudithook(WATCH)


@dataclass(frozen=True, slots=True)
class Outcome:
    """`kind`: done | refused | bug."""

    kind: str
    text: str
    """The message, or what went wrong and where in the package."""


def watched(act: Callable[[], object], allowed: Path, place: str) -> Outcome:
    """Do something to hostile input.

    Args:
        act: does it.
        allowed: the folder it may write to.
        place: a message must name this, or a key of the config.
    """
    WATCH.allowed, WATCH.wrong, WATCH.on = (str(allowed.resolve()),), [], True
    try:
        with _limited():
            act()
        outcome = Outcome("done", "")
    except PeftuneError as error:
        outcome = _refused(error, place)
    except Hang:
        outcome = Outcome("bug", f"hang: {LIMIT_S} s, {_where()}")
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 panics of Rust libraries are no Exception either
        outcome = Outcome("bug", _where())
    finally:
        WATCH.on = False
    return Outcome("bug", "; ".join(dict.fromkeys(WATCH.wrong))) if WATCH.wrong else outcome


def _refused(error: PeftuneError, place: str) -> Outcome:
    for fault in error.faults:
        named = place in str(fault) or any(f"{key}." in fault.message for key in ("model", "data", "adapter", "train"))
        if not fault.message.strip() or not (named or fault.file or fault.kind == "config"):
            return Outcome("bug", f"a message without a place: {fault}")
    return Outcome("refused", str(error))


def _where() -> str:
    """Exception and the innermost line of the package: what tells one bug from another."""
    kind, error, trace = sys.exc_info()
    ours = [frame for frame in traceback.extract_tb(trace) if frame.filename.startswith(PACKAGE)]
    at = f"{Path(ours[-1].filename).relative_to(PACKAGE)}:{ours[-1].lineno} {ours[-1].name}" if ours else "outside"
    return f"{kind.__name__ if kind else ''} at {at}: {error!s:.200}"


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    left = signal.setitimer(signal.ITIMER_REAL, LIMIT_S)[0]
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, before)
