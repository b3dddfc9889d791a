"""Hostile data files, for training and for `peftune predict`."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import os
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
from hypothesis import strategies as st
from pyarrow import parquet

from benchmarks.fuzz_values import NESTED, Draw, spoilt_bytes
from peftune.config.schema import DataConfig, EvaluationConfig, ModelConfig, TrainConfig
from peftune.data.prepare import open_prepared, prepare
from peftune.data.readers import READERS
from peftune.data.sources import read_records
from peftune.tasks import TASKS
from peftune.tasks.prompts import prompts_of
from peftune.tasks.text import Text, open_text
from tests import tiny

ROWS = {
    "sequence_classification": tiny.intent_rows(12),
    "token_classification": tiny.tagged_rows(12),
    "question_answering": tiny.question_rows(12, unanswerable=True),
    "causal_lm": tiny.chat_rows(12),
    "preference": tiny.preference_rows(12),
}
BY_TASK = {
    "causal_lm": [
        [{"text": f"plain text {n}"} for n in range(8)],
        [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(8)],
        [{"instruction": "say", "input": "", "output": f"it {n}"} for n in range(8)],
        [
            {
                "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": f"so {n}"}],
                "tools": [{"type": "function"}],
            }
            for n in range(8)
        ],
        [
            {
                "messages": [
                    {"role": "user", "content": "go"},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
                    },
                ]
            }
            for n in range(8)
        ],
    ],
    "preference": [
        [
            {
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{n}"}],
                "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],
            }
            for n in range(8)
        ]
    ],
    "sequence_classification": [
        [{"text": f"t {n}", "label": n / 7} for n in range(8)],
        [{"text": f"t {n}", "label": ["a", "b"][: n % 3]} for n in range(8)],
    ],
    "token_classification": [[{"tokens": ["a", "b"], "ner_tags": [0, n % 2]} for n in range(8)]],
    "question_answering": [
        [
            {
                "paragraphs": [
                    {
                        "context": "it is so",
                        "qas": [{"question": "is it?", "answers": [{"text": "so", "answer_start": 6}]}],
                    }
                ]
            }
            for _ in range(8)
        ]
    ],
}
SPECIAL = ("a folder", "a pipe", "/dev/zero", "/dev/null", "missing", "no permission")
"""What may lie where a file should."""


@st.composite
def data_files(draw: Draw) -> tuple[str, str, bytes | str, dict[str, Any]]:
    """A task, an ending, the file's bytes or what stands in its place, and settings of the data section."""
    task = draw(st.sampled_from(list(ROWS)))
    ending = draw(st.sampled_from((".jsonl", ".json", ".parquet", *sorted(READERS))))
    section = {
        "validation": draw(st.sampled_from((None, 0.3))),
        "on_bad_row": draw(st.sampled_from(("error", "skip"))),
        "max_length": draw(st.sampled_from((64, 64, 64, 8, 2, 1))),
        "too_long": draw(st.sampled_from(("truncate", "drop", "error"))),
        "train_on": draw(st.sampled_from(("completion", "last_turn", "all"))),
    }
    if not draw(st.integers(0, 4)):
        section["format"] = draw(st.sampled_from(TASKS[task](TrainConfig(), EvaluationConfig()).formats))
    if not draw(st.integers(0, 19)):
        return task, ending, draw(st.sampled_from(SPECIAL)), section
    rows = [dict(row) for row in draw(st.sampled_from([ROWS[task], *BY_TASK[task]]))]
    for _ in range(draw(st.sampled_from((0, 0, 1, 1, 2, 4)))):
        _spoil_row(draw, rows)
    content = _written(rows, ending, draw)
    return task, ending, spoilt_bytes(draw, content) if draw(st.integers(0, 3)) == 0 else content, section


def _spoil_row(draw: Draw, rows: list[Any]) -> None:
    number = draw(st.integers(0, len(rows) - 1))
    if not draw(st.integers(0, 9)) or not isinstance(rows[number], dict):
        rows[number] = draw(NESTED)
        return
    rows[number] = json.loads(json.dumps(rows[number]))
    holder, key = rows[number], draw(st.sampled_from([*rows[number], "id", "tools", "system", "text_pair", "label"]))
    while draw(st.booleans()) and isinstance(holder, dict) and isinstance(holder.get(key), dict | list) and holder[key]:
        holder = holder[key]
        if isinstance(holder, list):
            inside = draw(st.integers(0, len(holder) - 1))
            if isinstance(holder[inside], dict) and holder[inside]:
                holder = holder[inside]
                key = draw(st.sampled_from([*holder, "tool_calls", "weight"]))
            else:
                holder[inside] = draw(NESTED)
                return
        else:
            key = draw(st.sampled_from(list(holder)))
    if draw(st.integers(0, 4)):
        holder[key] = draw(NESTED)
    else:
        holder.pop(key, None)


def _written(rows: list[Any], ending: str, draw: Draw) -> bytes:
    if ending.endswith(".gz"):
        return gzip.compress(_written(rows, ending.removesuffix(".gz"), draw))
    if ending in (".parquet", ".arrow"):
        return _as_table(rows, ending, draw)
    if ending in (".csv", ".tsv"):
        stream = io.StringIO()
        writer = csv.writer(stream, delimiter="\t" if ending == ".tsv" else ",", escapechar="\\")
        records = [row for row in rows if isinstance(row, dict) and row] or [{"text": "x"}]
        writer.writerow(list(records[0]))
        for row in records:
            writer.writerow([value if isinstance(value, str) else json.dumps(value) for value in row.values()])
        text = stream.getvalue()
    elif ending == ".json":
        text = json.dumps({"data": rows} if draw(st.booleans()) else rows, ensure_ascii=draw(st.booleans()))
    elif ending in (".conll", ".bio", ".iob", ".iob2"):
        text = (
            "".join(
                f"{word} {tag}\n"
                for row in tiny.tagged_rows(6)
                for word, tag in zip(row["tokens"], row["ner_tags"], strict=True)
            )
            + "\nx\ny B-\n"
        )
    elif ending == ".txt":
        text = "\n".join(str(row) for row in rows)
    else:
        text = "".join(json.dumps(row, ensure_ascii=draw(st.booleans())) + "\n" for row in rows)
    return text.encode("utf-8", "surrogatepass")


STRANGE = (
    lambda n: pyarrow.array([b"\xff"] * n),
    lambda n: pyarrow.array([1] * n, pyarrow.date32()),
    lambda n: pyarrow.array([1] * n, pyarrow.timestamp("ns")),
    lambda n: pyarrow.array([None] * n, pyarrow.null()),
    lambda n: pyarrow.array([1] * n, pyarrow.duration("s")),
    lambda n: pyarrow.array([Decimal("1.50")] * n),
    lambda n: pyarrow.array([[("a", 1)]] * n, pyarrow.map_(pyarrow.string(), pyarrow.int8())),
    lambda n: pyarrow.array([{"when": datetime(2026, 1, 1)}] * n),
    lambda n: pyarrow.array([float("nan")] * n),
    lambda n: pyarrow.array(
        [
            [
                {"role": "user", "content": "x", "at": datetime(2026, 1, 1)},
                {"role": "assistant", "content": "y", "raw": b"\xff"},
            ]
        ]
        * n
    ),
)
"""Columns of values that JSON has no word for."""


def _as_table(rows: list[Any], ending: str, draw: Draw) -> bytes:
    """Columns as pyarrow infers them, or else their values as bytes; one perhaps of a type that JSON lacks."""
    records = [row for row in rows if isinstance(row, dict)]
    columns: dict[str, pyarrow.Array] = {}
    for name in dict.fromkeys(key for row in records for key in row):
        columns[name.encode("utf-8", "replace").decode()] = _column([row.get(name) for row in records])
    if columns and not draw(st.integers(0, 2)):
        columns[draw(st.sampled_from([*columns, "id"]))] = draw(st.sampled_from(STRANGE))(len(records))
    return _table_bytes(columns) if ending == ".parquet" else _arrow_bytes(columns, draw)


def _arrow_bytes(columns: dict[str, pyarrow.Array], draw: Draw) -> bytes:
    table, sink = pyarrow.table(columns), io.BytesIO()
    opened = draw(st.sampled_from((pyarrow.ipc.new_stream, pyarrow.ipc.new_file)))
    with opened(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _column(values: list[Any]) -> pyarrow.Array:
    try:
        array = pyarrow.array(values)
        _table_bytes({"x": array})
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
        return pyarrow.array([repr(value).encode("utf-8", "replace") for value in values])
    return array


def _table_bytes(columns: dict[str, pyarrow.Array]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


def put(path: Path, content: bytes | str) -> None:
    """Bytes, or one of SPECIAL, at a path."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "a folder":
        path.mkdir()
    elif content == "a pipe":
        os.mkfifo(path)
    elif content.startswith("/dev"):
        path.symlink_to(content)
    elif content == "no permission":
        path.write_bytes(b"x")
        path.chmod(0)


@functools.cache
def text_of(task: str, model: str) -> Text:
    """The text side of a task, opened once."""
    return open_text(
        TASKS[task](TrainConfig(), EvaluationConfig()),
        ModelConfig(name_or_path=model, dtype="float32"),
        DataConfig(train="x", max_length=64),
    )


def model_of(task: str, models: Path) -> str:
    """The tiny model that a task trains."""
    return str(models / ("decoder" if task in ("causal_lm", "preference") else "encoder"))


def act_on_data(draw: tuple[str, str, bytes | str, dict[str, Any]], folder: Path, models: Path) -> None:
    """Read, check, tokenise it; then read every example."""
    task, ending, content, section = draw
    path = folder / f"rows{ending}"
    put(path, content)
    text = text_of(task, model_of(task, models))
    config = DataConfig(train=str(path), **section)
    found = open_prepared(prepare(config, text.encoder, seed=0, identity=text.identity()))
    for split in found.splits.values():
        assert all(len(split[n].input_ids) for n in range(len(split)))


@st.composite
def inputs_to_predict(draw: Draw) -> tuple[str, str, bytes | str]:
    """A task, and a file of `peftune predict`."""
    task, ending, content, _ = draw(data_files())
    return task, ending, content


def act_on_input(draw: tuple[str, str, bytes | str], folder: Path, models: Path) -> None:
    """Read it and encode its records, as `peftune predict` does."""
    task, ending, content = draw
    path = folder / f"input{ending}"
    put(path, content)
    text = text_of(task, model_of(task, models))
    prompts_of(read_records(str(path)), text.encoder, {})
