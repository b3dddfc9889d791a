"""One run a folder: two would write over each other."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TextIO

from peftune.errors import Fault, RunFolderError, say
from peftune.loop.publish import refused

LOCK = ".lock"
"""File of the run folder. It stays there; what counts is the kernel's lock on it, which ends with the process."""
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say that know no locks: Lustre without `-o flock`, NFS without its lock daemon."""
LOOKING_S = 1.0
LEFTOVER_S = 60
"""What a failure has left of a run on another machine has ended so many seconds after `hang_timeout`."""


class FolderLock:
    """The right to write into a run folder, for as long as a block, or this process, lasts."""

    def __init__(self, folder: Path, hang_timeout_s: float | None = None) -> None:
        """`hang_timeout_s`: of the run; None waits for nobody."""
        self._folder, self._patience_s = folder, 0.0 if hang_timeout_s is None else hang_timeout_s + LEFTOVER_S
        self._file: TextIO | None = None

    def take(self, tick: Callable[[], None] = lambda: None) -> None:
        """Take it, if the folder is there and the lock is not this one's already.

        A run on another machine that holds it may be what a failure has left of this very run: it is waited for.

        Args:
            tick: called while it is.

        Raises:
            RunFolderError: another run writes there.
            Unwritable: nobody can.
        """
        if self._file is not None:
            return
        if not self._folder.is_dir():
            refuse_unmakeable(self._folder)
            return
        names = {path.name for path in self._folder.iterdir()}
        if names and not names & {LOCK, "config.yaml"}:
            return  # no run's folder: it will be refused, and nothing is to be left in it
        try:
            file = (self._folder / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            if (self._folder / "summary.json").is_file():
                return  # of a run that is done; it will be read only
            raise refused(self._folder, error) from None
        try:
            self._lock(file, tick)
        except OSError as error:
            file.close()
            if error.errno not in WITHOUT_LOCKS:
                raise refused(self._folder, error) from None
            say(f"{self._folder}: its file system has no locks ({error.strerror}): let no other run write there")
            return
        except RunFolderError:
            file.close()
            raise
        self._file = file
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
        file.flush()

    def _lock(self, file: TextIO, tick: Callable[[], None]) -> None:
        until, told = time.monotonic() + self._patience_s, False
        while True:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                host, who = _who(file.read())
            if host in (None, socket.gethostname()) or time.monotonic() > until:
                raise RunFolderError(Fault(
                    kind="run_folder", file=str(self._folder), message=f"another run writes there{who}",
                    mend="wait for it or end it, or choose another output_dir"))
            if not told:
                say(f"{self._folder}: another run writes there{who}; waited for, {self._patience_s:.0f} s at most")
            told = True
            tick()
            time.sleep(LOOKING_S)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()


def refuse_unmakeable(folder: Path) -> None:
    """See whether a run folder can be made, before a model is loaded for it.

    Raises:
        RunFolderError: a file, or a link that leads nowhere, is in its way, or its name begins with ~.
        Unwritable: nobody can write there.
    """
    if str(folder).startswith("~"):
        raise RunFolderError(Fault(
            kind="run_folder", file=str(folder), mend=f"output_dir={os.path.expanduser(folder)}",
            message="output_dir begins with ~, which only a shell takes for a home folder; here it is a name"))
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        kind = "a file" if there.exists() else "a link that leads nowhere"
        said = f"output_dir is {kind}" if there == folder.absolute() else f"cannot be made: {there} is {kind}"
        raise RunFolderError(Fault(kind="run_folder", file=str(folder), message=said, mend="choose another output_dir"))
    if not os.access(there, os.W_OK | os.X_OK):
        raise refused(folder, f"{there} is read-only, or not yours")


def _who(said: str) -> tuple[str | None, str]:
    """The machine of the run that holds the lock, and its process too in words; None where it is just being written."""
    try:
        taken = json.loads(said)
        return taken["host"], f": process {taken['process']} on {taken['host']}"
    except (ValueError, KeyError, TypeError):
        return None, ""
