"""What can go wrong in a way the user can mend: what, where, why, and the mend."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

EXIT_DONE = 0
EXIT_OUR_FAULT = 1
EXIT_MENDABLE = 2
EXIT_DOES_NOT_FIT = 3
EXIT_PREEMPTED = 75
EXIT_KEYBOARD = 130
EXIT_PIPE = 141

SHOWN_FAULTS = 20
KEPT_FAULTS = 1000
"""Of the rows of data: a file of another kind is wrong on every line."""

EXIT_CODE_FILE = "PEFTUNE_EXIT_CODE_FILE"
"""Environment variable: where the main process leaves its exit code, if `peftune train` has launched it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing to mend. `line` counts from 1; `file` is as the user wrote it."""

    kind: str
    """config | data | model | environment | run_folder | self_check | preempted, or the kind of a finding in data."""
    message: str
    mend: str = ""
    file: str | None = None
    line: int | None = None
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        place = "" if self.file is None else f"{self.file}:{self.line}: " if self.line else f"{self.file}: "
        mend = f"\n  mend: {self.mend}" if self.mend else ""
        return f"{place}{self.message}{mend}"

    def as_json(self) -> dict[str, Any]:
        """The keys of `peftune check --json`."""
        return asdict(self)


class PeftuneError(ValueError):
    """Something the user can mend. The doors print it without a traceback and exit with `exit_code`."""

    exit_code = EXIT_MENDABLE
    heading = "error"
    """Before the message."""

    def __init__(self, faults: Fault | Sequence[Fault]) -> None:
        self.faults: tuple[Fault, ...] = (faults,) if isinstance(faults, Fault) else tuple(faults)
        lines = [str(fault) for fault in self.faults[:SHOWN_FAULTS]]
        if len(self.faults) > SHOWN_FAULTS:
            lines.append(f"... and {beyond(len(self.faults), SHOWN_FAULTS)} more faults")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[PeftuneError], tuple[tuple[Fault, ...]]]:
        """Made of its faults again where another process takes it over."""
        return type(self), (self.faults,)


class ConfigError(PeftuneError):
    """The config, or an override of it, is wrong."""


class DataError(PeftuneError):
    """A data file, row or label is wrong."""


class ModelError(PeftuneError):
    """A model, tokenizer or adapter cannot be had, or does not suit the task."""


class MachineError(PeftuneError):
    """The machine lacks something this run asks for: a package, a device, a process."""


class RunFolderError(PeftuneError):
    """The output folder holds something this run must not touch or cannot continue."""


class Unwritable(RunFolderError):
    """Something of the run could not be put on disk. What was there before is as it was."""


class SelfCheckError(PeftuneError):
    """The run found that it does not do what it says: it stops before more time is lost."""


class Preempted(PeftuneError):
    """The run was told to stop and has saved what it had: started again, it goes on."""

    exit_code = EXIT_PREEMPTED
    heading = "stopped"


class OutOfMemory(PeftuneError):
    """The run does not fit into the memory that there is."""

    exit_code = EXIT_DOES_NOT_FIT
    heading = "out of memory"


class ExportError(PeftuneError):
    """What was to be exported is not the trained model: nothing is published. No mend of the user's can change it."""

    exit_code = EXIT_OUR_FAULT


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up. By name and text: torch is not imported here."""
    words = ("can't allocate memory", "cannot allocate memory", "out of memory", "alloc_failed")
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or any(said in str(error).lower() for said in words))


def in_a_line(error: BaseException) -> str:
    """Kind and beginning of an error that a library has raised."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


@contextlib.contextmanager
def writing_to(name: str, option: str) -> Iterator[None]:
    """Around what writes the file that a user has named by `option`. Raises MachineError where the disk refuses."""
    try:
        yield
    except OSError as error:
        raise MachineError(Fault(kind="environment", file=name, message=f"cannot be written: {error.strerror}",
                                 mend=f"give another {option}")) from None


def refuse_unwritable(name: str | None, option: str) -> None:
    """Raise MachineError where a file that a user has named by `option` cannot be written, before any work."""
    if name is None:
        return
    path = Path(name)
    there = path if path.exists() else next(folder for folder in path.absolute().parents if folder.exists())
    if there == path and path.is_dir():
        said = "is a folder"
    elif there != path and not there.is_dir():
        said = f"{there} is no folder"
    elif not os.access(there, os.W_OK):
        said = f"{there} is read-only, or not yours"
    else:
        return
    raise MachineError(Fault(kind="environment", file=name, message=f"cannot be written: {said}",
                             mend=f"give another {option}"))


def refuse_odd_name(name: str | None, what: str) -> None:
    """Raise MachineError for a name that is no UTF-8: no config, page or tokenizer can hold it.

    Args:
        name: given by the user; None is none.
        what: it names, for the message.
    """
    if name is not None and (plain := if_odd(name)):
        raise MachineError(Fault(kind="environment", file=plain, message=f"the name is not UTF-8 ({what})",
                                 mend="rename it, or give another"))


def if_odd(name: str) -> str | None:
    """How a name that is no UTF-8 can be shown; None for any other."""
    plain = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return plain if plain != name else None


def beyond(faults: int, shown: int) -> str:
    """How many faults there are beside those that are shown; of rows, no more are known than are kept."""
    return f"{'at least ' if faults >= KEPT_FAULTS else ''}{faults - shown:,}"


def faults_of(look: Callable[[], object]) -> list[Fault]:
    """Do something for its faults alone."""
    try:
        look()
    except PeftuneError as error:
        return list(error.faults)
    return []


def guarded(door: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a door; turn what the user can mend into a message and its exit code. Anything else keeps its traceback.

    Under `peftune train` the code goes into a file and the process ends with 0: launchers know of crashes only,
    and would bury the message under a trace of their own.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a letter that a terminal or a log cannot show must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = door(arguments)
        sys.stdout.flush()
    except PeftuneError as error:
        say(f"{error.heading}: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        say("stopped from the keyboard")
        code = EXIT_KEYBOARD
    except Exception as error:
        if several:
            traceback.print_exc()  # what python itself would do next, had the process not to end below
            _end_process(EXIT_OUR_FAULT)
        refusal = _refusal(error)
        if refusal is None:
            raise
        if refusal != EXIT_PIPE:
            say(f"error: cannot be written: {error}\n  mend: make room on the disk that is written to")
        code = refusal
    code = report_exit_code(code)
    if several:
        _end_process(code)
    return code


def _refusal(error: Exception) -> int | None:
    """The exit code if the reader of standard output is gone, or a disk is full. What waits to be written to standard
    output is dropped then: Python would try once more at the end."""
    gone = isinstance(error, BrokenPipeError) and _reader_is_gone()
    if not gone and not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return None
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return EXIT_PIPE if gone else EXIT_MENDABLE


def _reader_is_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # of errors it tells in any case
    return bool(poll.poll(0))


def report_exit_code(code: int, *, alone: bool = False) -> int:
    """Leave the code for `peftune train`, if that has launched this process; return the one to end with.

    The first failure counts. `alone`: the main process does not share this one, so launchers must see it, to end that.
    """
    report = os.environ.get(EXIT_CODE_FILE)
    if report is None:
        return code
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":  # one a machine: each has a launcher of its own
        try:
            if not Path(report).is_file() or Path(report).read_text() == str(EXIT_DONE):
                Path(report).write_text(str(code))
        except OSError:  # the disk is full: launchers know of this failure as of any
            Path(report).unlink(missing_ok=True)
            return code
    return code if alone else EXIT_DONE


def say(message: str) -> None:
    """One message on standard error, from the main process alone."""
    if is_main():
        print(message, file=sys.stderr, flush=True)


def is_main() -> bool:
    """Whether this is the only process, or the one of several that speaks."""
    return os.environ.get("RANK", "0") == "0"


def _end_process(code: int) -> NoReturn:
    """End without freeing communication groups: their destructors can wait for each other for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
