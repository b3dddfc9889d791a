"""Tokenised examples on disk: one Arrow file a split, memory-mapped, so that ranks share one copy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from peftune.data.examples import Example, TargetKind

ROWS_PER_CHUNK = 1024


def write(path: Path, examples: Iterable[Example], kind: TargetKind) -> int:
    """Write examples to a new Arrow file and return how many there were."""
    target = pa.float32() if kind == "values" else pa.int32()
    schema = pa.schema([
        ("input_ids", pa.list_(pa.int32())), ("targets", pa.list_(target)), ("num_targets", pa.int32()),
        ("full_length", pa.int32()), ("segment_ids", pa.list_(pa.int8())), ("source", pa.int16()),
        ("first_part", pa.int32()), ("record", pa.string()),
    ])
    count = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        chunk: list[dict[str, Any]] = []
        for example in examples:
            chunk.append({
                "input_ids": example.input_ids, "targets": example.targets, "num_targets": example.num_targets,
                "full_length": example.full_length, "segment_ids": example.segment_ids,
                "source": example.source, "first_part": example.first_part,
                "record": json.dumps(dict(example.record), ensure_ascii=False),
            })
            count += 1
            if len(chunk) == ROWS_PER_CHUNK:
                writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema))
                chunk = []
        if chunk:
            writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema))
    return count


class Split:
    """A split opened for reading. Examples are read from the map when asked for; only lengths are kept in memory."""

    def __init__(self, paths: Sequence[Path], kind: TargetKind) -> None:
        files = [pa.ipc.open_file(pa.memory_map(str(path))) for path in paths]
        self._chunks = [file.get_batch(i) for file in files for i in range(file.num_record_batches)]
        self._starts = np.cumsum([0] + [chunk.num_rows for chunk in self._chunks])
        self.lengths = self._gather(lambda chunk: chunk["input_ids"].value_lengths())
        """Tokens of each example, int32 [n]."""
        self.num_targets = self._gather(lambda chunk: chunk["num_targets"])
        """Supervised targets of each example, int32 [n]."""
        self.source = self._gather(lambda chunk: chunk["source"])
        """Source of each example, int32 [n]."""
        self.padded_lengths = self.lengths
        """What an example takes of a padded batch, int32 [n]: its length, or twice the longer one of a pair."""
        if kind == "pair":
            first = self._gather(lambda chunk: chunk["first_part"])
            self.padded_lengths = 2 * np.maximum(first, self.lengths - first)

    def _gather(self, column: Any) -> np.ndarray:
        parts = [column(chunk).to_numpy(zero_copy_only=False) for chunk in self._chunks]
        return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, position: int) -> Example:
        chunk_index = int(np.searchsorted(self._starts, position, side="right")) - 1
        chunk, row = self._chunks[chunk_index], position - int(self._starts[chunk_index])
        segments = chunk["segment_ids"][row]
        return Example(
            input_ids=chunk["input_ids"][row].values.to_numpy(),
            targets=chunk["targets"][row].values.to_numpy(),
            num_targets=chunk["num_targets"][row].as_py(),
            full_length=chunk["full_length"][row].as_py(),
            record=_Record(chunk["record"][row].as_py()),
            segment_ids=segments.values.to_numpy() if segments.is_valid else None,
            source=chunk["source"][row].as_py(),
            first_part=chunk["first_part"][row].as_py(),
        )

    def full_lengths(self) -> np.ndarray:
        """Tokens of each example before it was cut, int32 [n]."""
        return self._gather(lambda chunk: chunk["full_length"])

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of all examples, in order."""
        return (json.loads(text) for chunk in self._chunks for text in chunk["record"].to_pylist())


class _Record(Mapping[str, Any]):
    """A record of a predictions file, parsed when something asks for it: steps of training do not."""

    __slots__ = ("_text", "_values")

    def __init__(self, text: str) -> None:
        self._text = text
        self._values: dict[str, Any] | None = None

    def _parsed(self) -> dict[str, Any]:
        if self._values is None:
            self._values = json.loads(self._text)
        return self._values

    def __getitem__(self, key: str) -> Any:
        return self._parsed()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parsed())

    def __len__(self) -> int:
        return len(self._parsed())


class Part:
    """Rows of a split, spread evenly over it, with all the examples that each of them makes."""

    def __init__(self, split: Split, rows: int) -> None:
        """`rows`: how many rows at most; examples of one row lie together and have one source."""
        self._split = split
        starts = np.unique(np.linspace(0, len(split) - 1, min(rows, len(split))).astype(int))
        self.positions = sorted({at for start in starts for at in self._row_around(int(start))})
        self.padded_lengths = split.padded_lengths[self.positions]

    def _row_around(self, at: int) -> Iterator[int]:
        def same(other: int) -> bool:
            return bool(self._split[other].record["source"] == source)

        source, first = self._split[at].record["source"], at
        while first and same(first - 1):
            first -= 1
        yield first
        while (first := first + 1) < len(self._split) and same(first):
            yield first

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, position: int) -> Example:
        return self._split[self.positions[position]]


class MemorySplit:
    """Examples in memory, for records that are used once."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = list(examples)
        self.lengths = np.asarray([len(example.input_ids) for example in self._examples], dtype=np.int32)
        self.padded_lengths = np.asarray(
            [2 * max(e.first_part, len(e.input_ids) - e.first_part) if e.first_part else len(e.input_ids)
             for e in self._examples], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, position: int) -> Example:
        return self._examples[position]


class Readable(Protocol):
    """What an evaluation needs of a split."""

    padded_lengths: np.ndarray

    def __len__(self) -> int: ...
    def __getitem__(self, position: int) -> Example: ...
