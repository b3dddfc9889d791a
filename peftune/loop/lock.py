"""One run a folder: two would write over each other."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import TextIO

from peftune.errors import Fault, RunFolderError
from peftune.loop.publish import refused

LOCK = ".lock"
"""File of the run folder. It stays there; what counts is the kernel's lock on it, which ends with the process."""


class FolderLock:
    """The right to write into a run folder, for as long as a block, or this process, lasts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: TextIO | None = None

    def take(self) -> None:
        """Take it, if the folder is there and the lock is not this one's already.

        Raises:
            RunFolderError: another run writes there.
            Unwritable: nobody can.
        """
        if self._file is not None:
            return
        if not self._folder.is_dir():
            self._see_whether_it_can_be_made()
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
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            said = file.read()
            file.close()
            raise RunFolderError(Fault(
                kind="run_folder", file=str(self._folder), message=f"another run writes there{_who(said)}",
                mend="wait for it or end it, or choose another output_dir")) from None
        except OSError as error:
            file.close()
            raise refused(self._folder, error) from None
        self._file = file
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
        file.flush()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def _see_whether_it_can_be_made(self) -> None:
        """Before a model is loaded for it."""
        parent = next(folder for folder in self._folder.absolute().parents if folder.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise refused(self._folder, f"{parent} is read-only, or not yours")


def _who(said: str) -> str:
    try:
        taken = json.loads(said)
        return f": process {taken['process']} on {taken['host']}"
    except (ValueError, KeyError, TypeError):  # it is just being written
        return ""
