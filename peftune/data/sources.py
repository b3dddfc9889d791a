"""Files, globs, folders and hub ids -> raw rows, each with its file and line."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftune.config.schema import Source, Sources
from peftune.data.hub import hub_fingerprint, read_hub, refuse_hub_settings
from peftune.data.readers import READERS, kind_of_file
from peftune.data.rows import Faults, RawRow, file_fault
from peftune.disk import sha256
from peftune.errors import DataError, if_odd


def as_sources(sources: Sources) -> tuple[Source, ...]:
    """One path, or a list of paths and sources -> sources."""
    several = (sources,) if isinstance(sources, str) else sources
    return tuple(Source(path=source) if isinstance(source, str) else source for source in several)


def files_of(source: Source) -> list[Path]:
    """The files a source stands for, sorted by name; none for a hub id.

    Raises:
        DataError: nothing lies there, a file of an unknown kind, or files with settings for hub data sets.
    """
    path = Path(source.path)
    if path.is_dir():
        _refuse_saved_by_datasets(path)
        files = sorted(file for file in path.rglob("*") if kind_of_file(file) in READERS and file.is_file())
        missing = f"the folder holds no {', '.join(READERS)} file"
    elif path.exists():
        files, missing = [path], ""
    else:
        files = sorted(Path(name) for name in glob.glob(source.path, recursive=True))
        missing = "no such file"
        if not files and _may_be_hub_id(source.path):
            return []
    if not files:
        raise DataError(file_fault(source.path, None, missing, _mend_missing(path)))
    for file in files:
        refuse_odd_file(str(file))
        if file.is_dir():
            raise DataError(file_fault(str(file), None, "is a folder, among the files that match",
                                       f"a pattern of files alone, such as {path.parent / '*.jsonl'}"))
        if not file.is_file():
            raise DataError(file_fault(str(file), None, "no regular file",
                                       "name a file: a device or a pipe may never end"))
        if kind_of_file(file) not in READERS:
            raise DataError(file_fault(str(file), None, f"unknown kind of file {kind_of_file(file)!r}",
                                       f"use one of {', '.join(READERS)}"))
    refuse_hub_settings(source)
    return files


def refuse_odd_file(name: str) -> None:
    """Raise DataError for a name of a file that is no UTF-8: neither a config nor what a run writes can hold it."""
    if plain := if_odd(name):
        raise DataError(file_fault(plain, None, "the name of the file is not UTF-8", "rename it"))


def _refuse_saved_by_datasets(folder: Path) -> None:
    """Raise DataError for what `save_to_disk` of datasets wrote: of its files those that describe it look like data."""
    marks = (*folder.rglob("dataset_dict.json"), *folder.rglob("state.json"))
    saved = next((mark.parent for mark in marks if mark.name != "state.json" or any(mark.parent.glob("*.arrow"))), None)
    if saved is not None:
        one = "['train']" if (saved / "dataset_dict.json").is_file() else ""
        raise DataError(file_fault(
            str(saved), None, "is a data set in Arrow files, as save_to_disk writes them, which is not read whole",
            f"datasets.load_from_disk({str(saved)!r}){one}.to_parquet('train.parquet') makes a file that is"))


def fingerprint(source: Source) -> dict[str, Any]:
    """What identifies the content of a source: SHA-256 of each file, the fingerprint of a hub data set, or the version
    it gives itself where it is streamed."""
    files = files_of(source)
    if files:
        content = {str(file): sha256(file) for file in files}
    else:
        content = {source.path: hub_fingerprint(source)}
    return {**source.model_dump(mode="json"), "content": content}


def read(source: Source, faults: Faults) -> Iterator[RawRow]:
    """All rows of a source, in file order; lines that are no record go to `faults`.

    Raises:
        DataError: nothing lies there, or it cannot be had.
    """
    files = files_of(source)
    rows = itertools.chain.from_iterable(_read_file(file, faults) for file in files) if files else read_hub(source)
    return itertools.islice(rows, source.max_rows)


def read_records(path: str) -> list[RawRow]:
    """All records of one file. Raises DataError: missing, empty or broken."""
    refuse_odd_file(path)
    if Path(path).is_dir():
        raise DataError(file_fault(path, None, "is a folder", "name one of the files in it"))
    if not Path(path).is_file():
        raise DataError(file_fault(path, None, "no such file", _mend_missing(Path(path))))
    faults = Faults()
    records = list(read(Source(path=path), faults))
    if faults.count:
        raise DataError(faults.kept)
    return records


def _read_file(file: Path, faults: Faults) -> Iterator[RawRow]:
    rows, before = 0, faults.count
    for row in READERS[kind_of_file(file)](file, faults):
        rows += 1
        yield row
    if rows == 0 and faults.count == before:
        faults.add(file_fault(str(file), None, "the file holds no rows", "put one record a line into it"))


def _may_be_hub_id(path: str) -> bool:
    name = path.partition(":")[0]
    plain = all(part and not part.startswith(".") for part in name.split("/"))
    return plain and name.count("/") <= 1 and kind_of_file(Path(name)) not in READERS and "*" not in name


def _mend_missing(path: Path) -> str:
    if path.parent.is_dir():
        near = sorted(file.name for file in path.parent.iterdir() if kind_of_file(file) in READERS)
        if near:
            start = "" if path.is_absolute() else f"; paths begin in the current folder, {Path.cwd()}"
            return f"{path.parent} holds {', '.join(near[:8])}{start}"
    return f"paths are relative to the current folder, {Path.cwd()}"
