"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from peftune.disk import flush
from peftune.errors import Fault, RunFolderError, Unwritable


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes `path`. Raises Unwritable where the disk refuses."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise refused(path, error) from None


@contextlib.contextmanager
def warning_of_refusal(path: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Around what writes `path`, where the run goes on without it: told why the disk refuses."""
    try:
        with writing(path):
            yield
    except Unwritable as error:
        warn(str(error))


def refused(path: Path, reason: OSError | SafetensorError | str) -> Unwritable:
    """The error to raise where `path` cannot be written."""
    said = reason.strerror if isinstance(reason, OSError) else str(reason)
    return Unwritable(Fault(kind="run_folder", file=str(path), message=f"cannot be written: {said}",
                            mend="make room on this disk, or see who may write there"))


def refuse_vanished(run_folder: Path) -> None:
    """Raise Unwritable if a run's folder is not there any more. What is written then would begin a folder of its own,
    on whatever disk lies beneath."""
    if not (run_folder / "config.yaml").is_file():
        raise Unwritable(Fault(kind="run_folder", file=str(run_folder), message="cannot be written: it has vanished, "
                               "with all that lay there", mend="put it back, or mount its disk again"))


@contextlib.contextmanager
def published(folder: Path) -> Iterator[Path]:
    """Give a draft folder to fill; publish it if nothing was raised, else take it away.

    Raises:
        Unwritable: the disk refuses; an earlier folder of that name stays.
    """
    with writing(folder):
        draft = open_draft(folder)
        try:
            yield draft
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        publish_draft(folder)


def open_draft(folder: Path) -> Path:
    """A new empty folder beside `folder`."""
    recover(folder)
    draft = draft_of(folder)
    shutil.rmtree(draft, ignore_errors=True)
    new = [parent for parent in draft.parents if not parent.exists()]
    draft.mkdir(parents=True)
    for parent in new:
        flush(parent.parent)
    return draft


def publish_draft(folder: Path) -> None:
    """Flush a draft to disk and rename it to `folder`.

    An earlier folder of that name is moved aside first and deleted last. `recover` undoes a stop in between.
    """
    draft, aside = draft_of(folder), _aside(folder)
    try:
        for file in draft.rglob("*"):
            _readable(file)
            flush(file)
        flush(draft)
        if folder.exists():
            folder.rename(aside)
        draft.rename(folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def draft_of(folder: Path) -> Path:
    """Where a folder or file is written before it appears."""
    return folder.with_name(f".{folder.name}.draft")


def remove(folder: Path) -> None:
    """Delete a published folder: whole or, if stopped, out of sight."""
    gone = folder.with_name(f".{folder.name}.gone")
    folder.rename(gone)
    shutil.rmtree(gone)


def clear_drafts(folder: Path) -> None:
    """Delete what runs that died have left beside published folders and files. Nothing else may be writing there."""
    for left in (*folder.glob(".*.draft"), *folder.glob(".*.gone")):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def recover(folder: Path) -> None:
    """Put back a folder whose replacement was stopped between its two renames."""
    aside = _aside(folder)
    if aside.exists():
        if folder.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(folder)


def write_text(path: Path, text: str) -> None:
    """Write a file under another name, flush it, and rename it. What is a link or a device stays one."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(text, encoding="utf-8")
        return
    draft = draft_of(path)
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        draft.write_text(text, encoding="utf-8")
        flush(draft)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    draft.replace(path)
    flush(path.parent)


def write_json(path: Path, values: Any) -> None:
    """Strict JSON: a NaN is a fault of ours, not a word in a file."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A record that `write_json` has written. Raises RunFolderError where it is none any more."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, f"cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise damaged(path, "holds no record")
    return values


def damaged(path: Path, message: str) -> RunFolderError:
    """The error to raise where a file of a run folder is not as the run has written it."""
    return RunFolderError(Fault(kind="run_folder", file=str(path), message=message,
                                mend="put back what the run has written there"))


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _readable(path: Path) -> None:
    """Give a file the mode of any new file: some writers leave it to its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
