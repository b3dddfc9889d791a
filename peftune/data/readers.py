"""Files of each kind -> raw rows, each with its line."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import string
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peftune.data.rows import Faults, RawRow, file_fault
from peftune.data.tables import read_arrow, read_parquet


def kind_of_file(file: Path) -> str:
    """How its name ends, in small letters; of a compressed one with what it ends in before that."""
    kind = file.suffix.lower()
    return Path(file.stem).suffix.lower() + kind if kind == ".gz" else kind


def _opened(file: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb")


def _record(value: Any, file: Path, line: int, faults: Faults) -> RawRow | None:
    if isinstance(value, dict):
        return RawRow(value, str(file), line)
    kind = type(value).__name__
    faults.add(file_fault(str(file), line, f"a {kind}, not a record", 'write {"key": value, ...}'))
    return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A record of which each key is there once: of two, JSON readers silently take the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.40} is there twice in one record")
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _read_jsonl(file: Path, faults: Faults) -> Iterator[RawRow]:
    with _opened(file) as stream:
        for line, content in enumerate(stream, start=1):
            if not content.strip():
                continue
            try:
                text = content.decode("utf-8-sig" if line == 1 else "utf-8")
                value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
            except UnicodeDecodeError as error:
                faults.add(file_fault(str(file), line, f"not UTF-8 at byte {error.start} of the line", "save as UTF-8"))
            except (ValueError, RecursionError) as error:
                faults.add(file_fault(str(file), line, f"broken JSON: {error}", "mend or delete this line"))
            else:
                row = _record(value, file, line, faults)
                if row is not None:
                    yield row


def _read_json(file: Path, faults: Faults) -> Iterator[RawRow]:
    try:
        with _opened(file) as stream:
            text = stream.read().decode("utf-8-sig")
        values = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        mend = "one record a line is JSON Lines: name the file .jsonl" if error.msg == "Extra data" else "mend the JSON"
        faults.add(file_fault(str(file), error.lineno, f"broken JSON: {error.msg}", mend))
        return
    except (ValueError, RecursionError) as error:
        faults.add(file_fault(str(file), None, f"broken JSON: {error}", "save valid JSON as UTF-8"))
        return
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        values = values["data"]
    if not isinstance(values, list):
        faults.add(file_fault(str(file), 1, "not a list of records", 'write [{"key": value, ...}, ...]'))
        return
    for number, value in enumerate(_questions(values), start=1):
        row = _record(value, file, number, faults)
        if row is not None:
            yield row


def _questions(values: list[Any]) -> Iterator[Any]:
    """SQuAD's articles of paragraphs of questions -> one record a question; other values, and what is no such part
    of an article, as they are."""
    for value in values:
        if not isinstance(value, dict) or not isinstance(value.get("paragraphs"), list):
            yield value
            continue
        for paragraph in value["paragraphs"]:
            if not isinstance(paragraph, dict) or not isinstance(paragraph.get("qas", []), list):
                yield paragraph
                continue
            shared = {"context": paragraph.get("context"), "title": value.get("title")}
            yield from ({**question, **shared} if isinstance(question, dict) else question
                        for question in paragraph.get("qas", []))


def _read_csv(file: Path, faults: Faults) -> Iterator[RawRow]:
    csv.field_size_limit(2**31 - 1)  # texts may be longer than the 131,072 characters that Python takes of itself
    delimiter = "\t" if kind_of_file(file).startswith(".tsv") else ","
    header: list[str] = []
    try:
        with io.TextIOWrapper(_opened(file), encoding="utf-8-sig", newline="") as stream:
            for line, record in _csv_records(file, csv.reader(stream, delimiter=delimiter, strict=True), faults):
                if not header:
                    header = record
                    twice = next((name for name in header if header.count(name) > 1), None)
                    if twice is not None:
                        faults.add(file_fault(str(file), line, f"two columns are called {twice!r:.40}: no row is read",
                                              "give each column a name of its own"))
                        return
                elif len(record) != len(header):
                    faults.add(file_fault(
                        str(file), line, f"{len(record)} columns, and the header has {len(header)}",
                        f"give {len(header)} columns, with quotes around fields that hold {delimiter!r}"))
                else:
                    yield RawRow(dict(zip(header, record, strict=True)), str(file), line)
    except UnicodeDecodeError as error:
        faults.add(file_fault(str(file), None, f"not UTF-8 at byte {error.start}", "save as UTF-8"))


def _csv_records(file: Path, reader: Any, faults: Faults) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line it begins on; none after a header that is broken."""
    header = True
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            said, mend = f"broken CSV: {error}", 'write a quote inside a quoted field twice: ""'
            if "unexpected end of data" in str(error):
                said = f"a quote opens in this record and never closes: it takes all {reader.line_num - line + 1} lines"
                mend = 'close the quote, or write it twice inside a quoted field: ""'
            faults.add(file_fault(str(file), line, said + ", in the header: no row is read" * header, mend))
            if header:
                return
            continue
        if record:
            header = False
            yield line, record


def _read_text(file: Path, faults: Faults) -> Iterator[RawRow]:
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for line, text in enumerate(stream, start=1):
                if text.strip():
                    yield RawRow({"text": text.rstrip("\n")}, str(file), line)
    except UnicodeDecodeError as error:
        faults.add(file_fault(str(file), None, f"not UTF-8 at byte {error.start}", "save as UTF-8"))


def _read_conll(file: Path, faults: Faults) -> Iterator[RawRow]:
    """Columns files: a word a line, its tag in the last column, a blank line after each sentence. One with a word that
    cannot be read is left out. Tabs part the columns of a line that has some, else blanks; words may hold others."""
    words: list[str] = []
    tags: list[str] = []
    first, broken = 0, False
    with file.open("rb") as stream:
        for number, content in enumerate(itertools.chain(stream, [b""]), start=1):
            try:
                columns = _columns(content.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                faults.add(file_fault(str(file), number, f"not UTF-8 at byte {error.start} of the line",
                                      "save as UTF-8"))
                broken = True
                continue
            if not columns or columns[0] == "-DOCSTART-":
                if words and not broken:
                    yield RawRow({"tokens": words, "ner_tags": tags}, str(file), first)
                words, tags, broken = [], [], False
            elif len(columns) == 1:
                broken = True
                faults.add(file_fault(str(file), number, f"the word {columns[0]!r:.40} has no tag",
                                      "write the word, blanks, and its tag in the last column"))
            elif not (columns[0] == "#" and not words):
                first = first if words else number
                words.append(columns[0])
                tags.append(columns[-1])


def _columns(line: str) -> list[str]:
    line = line.strip(string.whitespace)  # of ASCII: a no-break space is a part of its word
    return [part.strip(" ") for part in line.split("\t" if "\t" in line else " ") if part.strip(" ")]


def _unpacked(read: Callable[[Path, Faults], Iterator[RawRow]]) -> Callable[[Path, Faults], Iterator[RawRow]]:
    def rows(file: Path, faults: Faults) -> Iterator[RawRow]:
        try:
            yield from read(file, faults)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            faults.add(file_fault(str(file), None, f"broken gzip: {error}", "compress the file again"))

    return rows


READERS: dict[str, Callable[[Path, Faults], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": _read_text,
    ".conll": _read_conll,
    ".bio": _read_conll,
    ".iob": _read_conll,
    ".iob2": _read_conll,
}
READERS |= {f"{kind}.gz": _unpacked(READERS[kind]) for kind in (".jsonl", ".ndjson", ".json", ".csv", ".tsv")}
