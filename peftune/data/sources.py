"""Files, globs, folders and hub ids -> raw rows, each with its file and line."""

from __future__ import annotations

import csv
import glob
import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peftune.config.schema import Source, Sources
from peftune.data.rows import RawRow
from peftune.errors import DataError, Fault, MachineError

MAX_FAULTS = 200
"""Reading stops after so many faults: a file of another kind would fault on every line."""


def as_sources(sources: Sources) -> tuple[Source, ...]:
    """One path, or a list of paths and sources -> sources."""
    several = (sources,) if isinstance(sources, str) else sources
    return tuple(Source(path=source) if isinstance(source, str) else source for source in several)


def files_of(source: Source) -> list[Path]:
    """The files a source stands for, sorted by name; none for a hub id.

    Raises:
        DataError: nothing lies there, or a file of an unknown kind.
    """
    path = Path(source.path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in READERS)
        missing = f"the folder holds no {', '.join(READERS)} file"
    elif path.exists():
        files, missing = [path], ""
    else:
        files = sorted(Path(name) for name in glob.glob(source.path, recursive=True))
        missing = "no such file"
        if not files and _may_be_hub_id(source.path):
            return []
    if not files:
        raise DataError(_fault(source.path, None, missing, _mend_missing(path)))
    for file in files:
        if file.suffix.lower() not in READERS:
            raise DataError(_fault(str(file), None, f"unknown kind of file {file.suffix!r}",
                                   f"use one of {', '.join(READERS)}"))
    return files


def fingerprint(source: Source) -> dict[str, Any]:
    """What identifies the content of a source: SHA-256 of each file, or the fingerprint of a hub data set."""
    files = files_of(source)
    content = {str(file): _sha256(file) for file in files} if files else {source.path: _load_hub(source)._fingerprint}
    return {"path": source.path, "split": source.split, "weight": source.weight, "content": content}


def read(source: Source) -> Iterator[RawRow]:
    """All rows of a source, in file order.

    Raises:
        DataError: with the place of every line that is not a record, once the source has been read.
    """
    files = files_of(source)
    if not files:
        yield from _read_hub(source)
        return
    faults: list[Fault] = []
    for file in files:
        rows = 0
        for row in READERS[file.suffix.lower()](file, faults):
            rows += 1
            yield row
        if rows == 0 and not faults:
            faults.append(_fault(str(file), None, "the file holds no rows", "put one record a line into it"))
        if len(faults) > MAX_FAULTS:
            break
    if faults:
        raise DataError(faults)


def read_records(path: str) -> Iterator[RawRow]:
    """All records of one file. Raises DataError: missing, empty or broken."""
    if not Path(path).is_file():
        raise DataError(_fault(path, None, "no such file", _mend_missing(Path(path))))
    return read(Source(path=path))


def _may_be_hub_id(path: str) -> bool:
    name = path.partition(":")[0]
    plain = all(part and not part.startswith(".") for part in name.split("/"))
    return plain and name.count("/") <= 1 and Path(name).suffix.lower() not in READERS and "*" not in name


def _mend_missing(path: Path) -> str:
    if path.parent.is_dir():
        near = sorted(file.name for file in path.parent.iterdir() if file.suffix.lower() in READERS)
        if near:
            return f"{path.parent} holds {', '.join(near[:8])}"
    return f"paths are relative to the current folder, {Path.cwd()}"


def _fault(file: str, line: int | None, message: str, mend: str) -> Fault:
    return Fault(kind="data", file=file, line=line, message=message, mend=mend)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _record(value: Any, file: Path, line: int, faults: list[Fault]) -> RawRow | None:
    if isinstance(value, dict):
        return RawRow(value, str(file), line)
    kind = type(value).__name__
    faults.append(_fault(str(file), line, f"a {kind}, not a record", 'write {"key": value, ...}'))
    return None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _read_jsonl(file: Path, faults: list[Fault]) -> Iterator[RawRow]:
    with file.open("rb") as stream:
        for line, content in enumerate(stream, start=1):
            if len(faults) > MAX_FAULTS:
                return
            if not content.strip():
                continue
            try:
                text = content.decode("utf-8-sig" if line == 1 else "utf-8")
                value = json.loads(text, parse_constant=_no_constant)
            except UnicodeDecodeError as error:
                faults.append(_fault(str(file), line, f"not UTF-8 at byte {error.start} of the line", "save as UTF-8"))
            except (ValueError, RecursionError) as error:
                faults.append(_fault(str(file), line, f"broken JSON: {error}", "mend or delete this line"))
            else:
                row = _record(value, file, line, faults)
                if row is not None:
                    yield row


def _read_json(file: Path, faults: list[Fault]) -> Iterator[RawRow]:
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"), parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        mend = "one record a line is JSON Lines: name the file .jsonl" if error.msg == "Extra data" else "mend the JSON"
        faults.append(_fault(str(file), error.lineno, f"broken JSON: {error.msg}", mend))
        return
    except (ValueError, RecursionError) as error:
        faults.append(_fault(str(file), None, f"broken JSON: {error}", "save valid JSON as UTF-8"))
        return
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        values = values["data"]
    if not isinstance(values, list):
        faults.append(_fault(str(file), 1, "not a list of records", 'write [{"key": value, ...}, ...]'))
        return
    for number, value in enumerate(values, start=1):
        row = _record(value, file, number, faults)
        if row is not None:
            yield row


def _read_csv(file: Path, faults: list[Fault]) -> Iterator[RawRow]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
            for values in reader:
                if None in values or None in values.values():
                    faults.append(_fault(str(file), reader.line_num, "other columns than the header",
                                         f"give {len(reader.fieldnames or ())} columns, with quotes around delimiters"))
                else:
                    yield RawRow(values, str(file), reader.line_num)
    except UnicodeDecodeError as error:
        faults.append(_fault(str(file), None, f"not UTF-8 at byte {error.start}", "save as UTF-8"))
    except csv.Error as error:
        faults.append(_fault(str(file), None, f"broken CSV: {error}", "quote fields that hold delimiters"))


def _read_parquet(file: Path, faults: list[Fault]) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield RawRow(value, str(file), number)
    except (pyarrow.ArrowException, OSError) as error:
        faults.append(_fault(str(file), None, f"broken Parquet: {error}", "write the file again"))


def _read_text(file: Path, faults: list[Fault]) -> Iterator[RawRow]:
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for line, text in enumerate(stream, start=1):
                if text.strip():
                    yield RawRow({"text": text.rstrip("\n")}, str(file), line)
    except UnicodeDecodeError as error:
        faults.append(_fault(str(file), None, f"not UTF-8 at byte {error.start}", "save as UTF-8"))


READERS: dict[str, Callable[[Path, list[Fault]], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _read_hub(source: Source) -> Iterator[RawRow]:
    for number, values in enumerate(_load_hub(source), start=1):
        yield RawRow(values, source.path, number)


def _load_hub(source: Source) -> Any:
    """A `datasets.Dataset` for `org/name`, or `org/name:configuration`; later calls take it from the local cache."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise MachineError(
            Fault(kind="environment", message=f"{source.path} is no file here; hub ids need the package datasets",
                  mend="pip install datasets, or give the path of a file")
        ) from None
    name, _, configuration = source.path.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split=source.split)
    except Exception as error:  # the hub client raises many unrelated types; all mean: cannot be had
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise DataError(
            _fault(source.path, None, f"neither a file here nor a data set that can be reached: {reason}",
                   _mend_missing(Path(source.path)))
        ) from error
