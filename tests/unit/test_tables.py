"""Tables of columns, and packed files: what is read, and which numbers have names, as datasets writes them."""

import gzip
import json
from datetime import datetime

import pyarrow as pa
import pytest
from pyarrow import parquet

from peftune.config.schema import DataConfig, Source
from peftune.data.rows import Faults
from peftune.data.sources import read
from peftune.data.spool import SPLITS, spool_rows

ROWS = [{"label": 1, "ner_tags": [0, 1], "text": "a", "number": 1},
        {"label": 0, "ner_tags": [], "text": "b", "number": 0},
        {"label": -1, "ner_tags": None, "text": "c", "number": 1}]
NAMED = [{"label": "good", "ner_tags": ["O", "B-x"], "text": "a", "number": 1},
         {"label": "bad", "ner_tags": [], "text": "b", "number": 0},
         {"label": -1, "ner_tags": None, "text": "c", "number": 1}]


def rows_of(path):
    faults = Faults()
    rows = [dict(row.values) for row in read(Source(path=str(path)), faults)]
    assert not faults.count, faults.kept
    return rows


@pytest.fixture
def data_set():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({
        "label": datasets.ClassLabel(names=["bad", "good"]), "text": datasets.Value("string"),
        "ner_tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B-x"])), "number": datasets.Value("int64")})
    return datasets.Dataset.from_list(ROWS, features=features)


def test_classes_of_a_parquet_file_that_datasets_wrote_have_their_names(data_set, tmp_path):
    data_set.to_parquet(tmp_path / "d.parquet")
    assert rows_of(tmp_path / "d.parquet") == NAMED


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files_with_and_without_an_index_are_read(data_set, kind, tmp_path):
    table = data_set.data.table
    with pa.OSFile(str(tmp_path / "d.arrow"), "wb") as sink, {
            "stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[kind](sink, table.schema) as writer:
        writer.write_table(table)
        writer.write_table(table)
    assert rows_of(tmp_path / "d.arrow") == [*NAMED, *NAMED]


@pytest.mark.parametrize("name", ["d.arrow", "d.jsonl.gz", "d.csv.gz", "d.json.gz", "d.parquet"])
@pytest.mark.parametrize("content", [b"", b"no such file", b"ARROW1\0\0 and no more", b"\x1f\x8b\x08 and no more",
                                     gzip.compress(b"text,label\n" * 99)[:-9]],
                         ids=["empty", "text", "cut arrow", "cut head", "cut gzip"])
def test_broken_files_are_refused_and_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    faults = Faults()
    list(read(Source(path=str(tmp_path / name)), faults))
    assert faults.count and faults.kept[0].file == str(tmp_path / name)


def test_an_arrow_file_whose_texts_end_beyond_it_is_refused(tmp_path):
    table = pa.table({"text": pa.array(["abcdefgh"] * 3)})
    with pa.OSFile(str(tmp_path / "d.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = (tmp_path / "d.arrow").read_bytes()
    ends = b"".join(number.to_bytes(4, "little") for number in (0, 8, 16, 24))
    assert content.count(ends) == 1
    (tmp_path / "d.arrow").write_bytes(content.replace(ends, ends[:12] + (2**30).to_bytes(4, "little")))
    faults = Faults()
    assert not list(read(Source(path=str(tmp_path / "d.arrow")), faults)) and "broken Arrow" in faults.kept[0].message


@pytest.mark.parametrize("list_of", [
    lambda names: {"feature": names, "_type": "List"}, lambda names: {"feature": names, "_type": "Sequence"},
    lambda names: [names]])
def test_lists_of_classes_are_named_however_the_schema_writes_them(list_of, tmp_path):
    def classes(*names):
        return {"names": list(names), "_type": "ClassLabel"}

    described = {"info": {"features": {"label": classes("bad", "good"), "ner_tags": list_of(classes("O", "B-x")),
                                       "text": {"dtype": "string", "_type": "Value"}}}}
    table = pa.Table.from_pylist(ROWS).replace_schema_metadata({b"huggingface": json.dumps(described).encode()})
    parquet.write_table(table, tmp_path / "d.parquet")
    assert rows_of(tmp_path / "d.parquet") == NAMED


@pytest.mark.parametrize("metadata", [None, {b"huggingface": b"{"}, {b"huggingface": b"[]"}, {b"other": b""},
                                      {b"huggingface": b'{"info": {"features": null}}'},
                                      {b"huggingface": b'{"info": {"features": {"label": '
                                                       b'{"_type": "ClassLabel", "names": [[0], 1]}}}}'}])
def test_without_names_in_the_schema_numbers_stay_numbers(metadata, tmp_path):
    parquet.write_table(pa.Table.from_pylist(ROWS).replace_schema_metadata(metadata), tmp_path / "d.parquet")
    assert rows_of(tmp_path / "d.parquet") == ROWS


def test_turns_that_hold_dates_are_read_with_the_dates_as_texts(tmp_path):
    said = [{"role": role, "content": "hi", "timestamp": datetime(2024, 7, 26, 10)} for role in ("user", "assistant")]
    parquet.write_table(pa.Table.from_pylist([{"messages": said}]), tmp_path / "d.parquet")
    config = DataConfig(train=str(tmp_path / "d.parquet"), validation=None)
    spools, found = spool_rows(config, ("messages",), 0, SPLITS, tmp_path)
    (row,) = spools["train"].read()
    assert not found.faults.count and row.fields["messages"][0]["timestamp"] == "2024-07-26 10:00:00"
