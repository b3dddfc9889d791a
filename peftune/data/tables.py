"""Tables of columns on disk, Parquet and Arrow, -> raw rows; numbers that stand for names become the names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peftune.data.rows import Faults, RawRow, file_fault, record_of

ROWS_AT_ONCE = 1024
ARROW_FILE = b"ARROW1"
"""What the format with an index begins with."""


def read_parquet(file: Path, faults: Faults) -> Iterator[RawRow]:
    """Rows of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        names = class_names(table.schema_arrow.metadata)
        yield from _rows(file, table.iter_batches(batch_size=ROWS_AT_ONCE), names)
    except (pyarrow.ArrowException, OSError) as error:
        faults.add(file_fault(str(file), None, f"broken Parquet: {error}", "write the file again"))


def read_arrow(file: Path, faults: Faults) -> Iterator[RawRow]:
    """Rows of an Arrow file: a stream of batches, as the library datasets keeps them, or one with an index."""
    import pyarrow
    from pyarrow import ipc

    try:
        with pyarrow.memory_map(str(file)) as source:
            indexed = source.read(len(ARROW_FILE)) == ARROW_FILE
            source.seek(0)
            table = ipc.open_file(source) if indexed else ipc.open_stream(source)
            batches = (table.get_batch(n) for n in range(table.num_record_batches)) if indexed else iter(table)
            yield from _rows(file, _few_rows(batches), class_names(table.schema.metadata))
    except (pyarrow.ArrowException, OSError) as error:
        faults.add(file_fault(str(file), None, f"broken Arrow: {error}", "write the file again"))


def _few_rows(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        batch.validate(full=True)  # reading past the end of a damaged one would end the process
        for begin in range(0, batch.num_rows, ROWS_AT_ONCE):
            yield batch.slice(begin, ROWS_AT_ONCE)


def _rows(file: Path, batches: Iterator[Any], names: Mapping[str, list[str]]) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield RawRow(record_of(values, names), str(file), number)


def class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Columns whose numbers stand for names -> the names, as the library datasets writes them beside a table's schema;
    also where each row holds a list of them. Nothing where another program has written it."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        found = {column: _names_of(feature) for column, feature in features.items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {column: names for column, names in found.items() if names}


def _names_of(feature: Any) -> list[str] | None:
    inner = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
    names = inner.get("names") if isinstance(inner, Mapping) and inner.get("_type") == "ClassLabel" else None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
