"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def published(folder: Path) -> Iterator[Path]:
    """Give a draft folder to fill; flush it to disk and rename it to `folder` if nothing was raised.

    An earlier folder of that name is moved aside first and deleted last. `recover` undoes a stop in between.
    """
    draft, aside = draft_of(folder), folder.with_name(f".{folder.name}.old")
    recover(folder)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    for file in draft.rglob("*"):
        _readable(file)
        _flush(file)
    _flush(draft)
    if folder.exists():
        folder.rename(aside)
    draft.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def draft_of(folder: Path) -> Path:
    """Where a folder is written before it appears."""
    return folder.with_name(f".{folder.name}.draft")


def recover(folder: Path) -> None:
    """Put back a folder whose replacement was stopped between its two renames."""
    aside = folder.with_name(f".{folder.name}.old")
    if aside.exists():
        if folder.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(folder)


def write_text(path: Path, text: str) -> None:
    """Write a file under another name, flush it, and rename it."""
    draft = path.with_name(f".{path.name}.draft")
    draft.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text(text, encoding="utf-8")
    _flush(draft)
    draft.replace(path)


def write_json(path: Path, values: Any) -> None:
    """Strict JSON: a NaN is a fault of ours, not a word in a file."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _readable(path: Path) -> None:
    """Give a file the mode of any new file: some writers leave it to its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
