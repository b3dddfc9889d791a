"""Files to rows to examples: what is read, what is refused, what a step sees."""

import gzip
import itertools
import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from peftune.config.schema import DataConfig, Source
from peftune.data import store
from peftune.data.batches import BatchPlan, evaluation_batches
from peftune.data.canonical import prompt_fields
from peftune.data.examples import Example
from peftune.data.formats import Found, canonical_rows
from peftune.data.prepare import row_faults
from peftune.data.rows import Faults, Row
from peftune.data.sources import read
from peftune.data.splits import held_out, split_key
from peftune.data.spool import SPLITS, Spool, spool_rows
from peftune.data.store import Split, write
from peftune.errors import DataError
from peftune.numerics.dealing import equal_groups, packed_groups, padded_groups

CAUSAL = ("messages", "sharegpt", "alpaca", "prompt_completion", "text")


def rows_of(path, **more):
    faults = Faults()
    rows = [dict(row.values) for row in read(Source(path=str(path), **more), faults)]
    if faults.count:
        raise DataError(faults.kept)
    return rows


def canonical(values, accepts=CAUSAL, **options):
    found = Found()
    raw = list(read_values(values))
    rows = list(canonical_rows(raw, format=options.get("format", "auto"), accepts=accepts,
                               columns=options.get("columns", {}), source=0, numbers=itertools.count(), found=found))
    return rows, found


def read_values(values):
    from peftune.data.rows import RawRow

    return (RawRow(value, "f.jsonl", line) for line, value in enumerate(values, start=1))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "txt"])
def test_every_kind_of_file_gives_its_rows_and_their_lines(tmp_path, kind):
    rows = [{"text": "a, b", "label": "x"}, {"text": "c", "label": "y"}]
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        path.write_text('text,label\n"a, b",x\nc,y\n')
    elif kind == "tsv":
        path.write_text("text\tlabel\na, b\tx\nc\ty\n")
    elif kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("a, b\nc\n")
        rows = [{"text": "a, b"}, {"text": "c"}]
    assert rows_of(path) == rows
    if kind in ("jsonl", "json", "csv", "tsv"):
        packed = tmp_path / "packed" / f"data.{kind}.gz"
        packed.parent.mkdir()
        packed.write_bytes(gzip.compress(path.read_bytes()))
        assert rows_of(packed) == rows_of(packed.parent) == rows


@pytest.mark.parametrize(("files", "split"), [
    (("data-00000-of-00001.arrow", "dataset_info.json", "state.json"), ""),
    (("dataset_dict.json", "train/data-00000-of-00001.arrow", "train/state.json"), "['train']"),
])
def test_a_folder_that_save_to_disk_wrote_is_named_as_one(tmp_path, files, split):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="as save_to_disk writes them") as caught:
        list(read(Source(path=str(tmp_path)), Faults()))
    assert f"load_from_disk({str(tmp_path)!r}){split}.to_parquet(" in caught.value.faults[0].mend


def test_a_folder_and_a_glob_give_the_rows_of_their_files_in_order(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    assert rows_of(tmp_path) == rows_of(tmp_path / "*.jsonl") == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(("content", "line", "said"), [
    (b'{"text": "a"}\n{"text": \n', 2, "broken JSON"),
    (b'{"text": "a"}\n{"text": "\xff"}\n', 2, "UTF-8"),
    (b'{"text": "a"}\n\n[1]\n', 3, "not a record"),
    (b'{"text": NaN}\n', 1, "NaN"),
    (b'{"text": "a"}\n{"text": "b", "n": {"k": 1, "k": 2}}\n', 2, "'k' is there twice"),
    (b"", None, "no rows"),
])
def test_a_bad_line_is_named(tmp_path, content, line, said):
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        rows_of(path)
    fault = caught.value.faults[0]
    assert fault.line == line and said in fault.message and fault.file == str(path)


def test_broken_records_of_a_csv_are_each_named_at_the_line_where_they_begin(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('text,label\n\n"two\nlines",x\na,b,c\n"said "so", twice",y\ngood,x\n"opened,y\nlost,x\n')
    faults = Faults()
    rows = [(row.line, row.values) for row in read(Source(path=str(path)), faults)]
    assert rows == [(3, {"text": "two\nlines", "label": "x"}), (7, {"text": "good", "label": "x"})]
    assert [fault.line for fault in faults.kept] == [5, 6, 8]
    said = faults.kept[-1]
    assert "never closes: it takes all 2 lines" in said.message and "close the quote" in said.mend


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_field_of_a_csv_may_be_of_any_length(tmp_path, kind):
    path, long = tmp_path / f"d.{kind}", "word " * 30_000
    path.write_text(f"text\n{long}\n")
    assert rows_of(path) == [{"text": long}]


@pytest.mark.parametrize(("content", "line", "said"), [
    ('text,"label\ngood,x\nbad,y\n', 1, "a quote opens in this record and never closes: it takes all 3 lines, in the"),
    ('\ntext,"la"bel"\ngood,x\nbad,y\n', 2, "broken CSV: ',' expected after '\"', in the header: no row is read"),
    ("text,label,text\ngood,x,bad\n", 1, "two columns are called 'text': no row is read"),
])
def test_a_csv_whose_header_is_broken_or_names_a_column_twice_gives_no_rows(tmp_path, content, line, said):
    path = tmp_path / "d.csv"
    path.write_text(content)
    faults = Faults()
    assert not list(read(Source(path=str(path)), faults))
    (fault,) = faults.kept
    assert (fault.file, fault.line) == (str(path), line) and said in fault.message and fault.mend


def test_a_missing_file_is_said_with_what_is_there(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match="no such file") as caught:
        rows_of(tmp_path / "trian.jsonl")
    assert "train.jsonl" in caught.value.faults[0].mend


@pytest.mark.parametrize(("values", "format", "fields"), [
    ({"text": "t"}, "text", {"text": "t"}),
    ({"prompt": "p", "completion": "c"}, "prompt_completion", {"prompt": "p", "completion": "c"}),
    ({"instruction": "i", "input": "x", "output": "o"}, "alpaca",
     {"messages": [{"role": "user", "content": "i\n\nx"}, {"role": "assistant", "content": "o"}]}),
    ({"instruction": "i", "input": "", "output": "o"}, "alpaca",
     {"messages": [{"role": "user", "content": "i"}, {"role": "assistant", "content": "o"}]}),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt",
     {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "messages",
     {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
])
def test_formats_are_found_from_the_columns(values, format, fields):
    rows, found = canonical([values])
    assert not found.faults.count and found.formats == {"f.jsonl": format} and rows[0].fields == fields


@pytest.mark.parametrize("values", [
    {"instruction": "i", "output": ""}, {"instruction": "i", "output": 3}, {"prompt": "p", "completion": None},
    {"messages": []}, {"messages": [{"role": "user", "content": "q"}]}, {"text": "half \ud800"},
    {"text": "whole", "id": "half \ud800"},
    {"messages": [{"role": "king", "content": "q"}]}, {"conversations": [{"from": "gpt"}]}, {"text": ["a"]},
])
def test_a_row_that_does_not_fit_its_format_is_a_fault_with_its_line(values):
    rows, found = canonical([values])
    assert not rows and found.faults.kept[0].line == 1 and found.faults.kept[0].mend


def test_a_folder_among_the_files_of_a_glob_is_named_as_one(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="sub: is a folder, among the files that match"):
        list(read(Source(path=f"{tmp_path}/*"), Faults()))
    assert len(list(read(Source(path=f"{tmp_path}/*.jsonl"), Faults()))) == 1


def test_a_missing_file_beside_others_is_said_to_be_looked_for_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=f"holds other.jsonl; paths begin in the current folder, {tmp_path}"):
        list(read(Source(path="rows.jsonl"), Faults()))


def test_turns_that_are_missing_are_told_from_those_that_are_null():
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            {"prompt": "q", "completion": "a"}, {"messages": None}]
    assert [fault.message for fault in canonical(rows)[1].faults.kept] == [
        "messages is missing", "messages is null, not a list of turns"]


def test_a_given_format_whose_columns_are_lacking_is_told_from_rows_that_fit_none():
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(DataError, match=r"'alpaca' needs instruction, output; .* those of messages\n.*=auto"):
        canonical([row], format="alpaca")
    with pytest.raises(DataError, match="columns a fit no format"):
        canonical([{"a": 1}], format="alpaca")


TOOLS = [{"type": "function", "function": {"name": "lookup"}}]


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
])
def test_tools_may_be_a_json_text_in_training_and_prediction_and_else_are_a_fault(row):
    accepts = ("preference",) if "chosen" in row else CAUSAL
    for tools in (TOOLS, json.dumps(TOOLS)):
        rows, found = canonical([{**row, "tools": tools}], accepts)
        assert rows[0].fields["tools"] == TOOLS
        if "chosen" not in row:
            assert prompt_fields({**row, "tools": tools}, found.formats["f.jsonl"])["tools"] == TOOLS
    for tools in (None, [], "", "[]"):
        assert "tools" not in canonical([{**row, "tools": tools}], accepts)[0][0].fields
    for tools in ("lookup", "{}", json.dumps(["lookup"]), {"name": "lookup"}, ["lookup"], 3, "[" * 100_000):
        rows, found = canonical([{**row, "tools": tools}], accepts)
        assert not rows and "tools is" in found.faults.kept[0].message


@pytest.mark.parametrize("label", [float("nan"), float("-inf"), [0.5, float("nan")]])
def test_a_label_that_is_no_finite_number_is_a_fault_and_makes_no_regression_of_classes(label):
    rows, found = canonical([{"text": "a", "label": 1.0}, {"text": "b", "label": label}], ("classification",))
    assert [row.line for row in rows] == [1] and "not a finite number" in found.faults.kept[0].message


def test_columns_are_renamed_and_a_likely_rename_is_suggested():
    rows, _ = canonical([{"sentence": "s", "intent": "i"}], ("classification",),
                        columns={"text": "sentence", "label": "intent"})
    assert rows[0].fields["text"] == "s" and rows[0].fields["label"] == "i"
    with pytest.raises(DataError) as caught:
        canonical([{"sentence": "s", "intent": "i"}], ("classification",))
    assert "data.columns={text: sentence, label: intent}" in caught.value.faults[0].mend


@pytest.mark.parametrize(("setting", "said"), [
    ({"split": "nosuch"}, "split is for data sets of the hub"), ({"streaming": True}, "streaming is for data sets"),
])
def test_settings_of_hub_data_sets_are_refused_on_files(tmp_path, setting, said):
    (tmp_path / "d.jsonl").write_text('{"text": "x"}')
    for path in (tmp_path / "d.jsonl", tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match=said):
            rows_of(path, **setting)


def test_a_rename_of_a_column_that_no_row_has_is_a_fault(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": "l"}\n')
    (tmp_path / "b.jsonl").write_text('{"Message": "x", "label": "l"}\n')
    paths = {"train": str(tmp_path / "a.jsonl"), "validation": str(tmp_path / "b.jsonl")}
    with pytest.raises(DataError, match="no row has a column nope") as caught:
        row_faults(DataConfig(**paths, columns={"text": "Message", "label": "nope"}), ("classification",), 0)
    assert len(caught.value.faults) == 1 and "text, label, Message" in caught.value.faults[0].mend
    assert not row_faults(DataConfig(**paths, columns={"text": "Message"}), ("classification",), 0)
    assert not row_faults(DataConfig(**paths, columns={"text": "Message"}), ("classification",), 0, ("train",))


def test_every_fault_of_every_file_is_said_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": "l"}\n{"text": ""\n')
    (tmp_path / "b.jsonl").write_text('{"text": "", "label": "l"}\n{"text": "y", "label": null}\n')
    faults = row_faults(DataConfig(train=str(tmp_path / "a.jsonl"), validation=str(tmp_path / "b.jsonl")),
                        ("classification",), 0)
    assert [(fault.file[-7:], fault.line) for fault in faults] == [("a.jsonl", 2), ("b.jsonl", 1), ("b.jsonl", 2)]


def test_a_missing_file_does_not_hide_the_faults_of_the_others(tmp_path):
    from peftune.data.prepare import prepare
    from peftune.tasks.sequence_classification import SEQUENCE_CLASSIFICATION
    from peftune.tasks.task import BoundEncoder, TextEncoder

    (tmp_path / "a.jsonl").write_text('{"text": ""\n')
    config = DataConfig(train=str(tmp_path / "a.jsonl"), validation=str(tmp_path / "none.jsonl"))
    encoder = BoundEncoder(SEQUENCE_CLASSIFICATION, TextEncoder(None, 9, config))
    with pytest.raises(DataError) as caught:
        prepare(config, encoder, seed=0, identity={})
    assert sorted(str(fault.line) for fault in caught.value.faults) == ["1", "None"]


def test_a_file_without_a_good_row_leads_with_what_is_wrong_in_it(tmp_path):
    from peftune.data.prepare import prepare
    from peftune.tasks.sequence_classification import SEQUENCE_CLASSIFICATION
    from peftune.tasks.task import BoundEncoder, TextEncoder

    (tmp_path / "a.csv").write_bytes("text,label\nné,x\n".encode("latin-1"))
    config = DataConfig(train=str(tmp_path / "a.csv"), validation=None)
    encoder = BoundEncoder(SEQUENCE_CLASSIFICATION, TextEncoder(None, 9, config))
    with pytest.raises(DataError) as caught:
        prepare(config, encoder, seed=0, identity={}, inspect=True)
    first, last = caught.value.faults
    assert "not UTF-8" in str(first)
    assert str(last).startswith(f"{tmp_path / 'a.csv'}: train: the split has no good row")


@pytest.mark.parametrize("broken", [{"qas": ["no record"]}, {"qas": None}, {"qas": 3}, "no record", None])
def test_what_is_no_question_in_an_article_of_squad_is_a_fault_and_hides_no_other(broken, tmp_path):
    answer = {"text": "cat", "answer_start": 4}
    good = {"context": "the cat", "qas": [{"question": "who?", "answers": [answer]}]}
    paragraphs = [good, {"context": "c", **broken} if isinstance(broken, dict) else broken]
    (tmp_path / "d.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    faults = row_faults(DataConfig(train=str(tmp_path / "d.json"), validation=None), ("squad",), 0)
    assert [fault.line for fault in faults] == [2]


def test_rows_without_an_id_have_numbers_of_their_own_where_bad_rows_of_other_files_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": ""}\n{"text": "y"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "z"}\n')
    config = DataConfig(train=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")), validation=None)
    spools, found = spool_rows(config, ("text",), 0, SPLITS, tmp_path)
    assert found.faults.count == 1 and [row.id for row in spools["train"].read()] == ["0", "2", "3"]


def test_a_fraction_is_split_off_by_content_whatever_the_order_and_duplicates_stay_together():
    rows = [{"text": str(number % 30)} for number in range(60)]

    def held(some, seed):
        mask = held_out(np.array([split_key(row, seed) for row in some], np.uint64), 0.2)
        return [row["text"] for row, out in zip(some, mask, strict=True) if out]

    found = held(rows, 3)
    assert 12 <= len(found) <= 14 and all(found.count(text) == 2 for text in found)
    assert sorted(held(rows[::-1], 3)) == sorted(found) and sorted(held(rows, 4)) != sorted(found)


def test_a_stored_example_comes_back_equal(tmp_path):
    examples = [Example([1, 2, 3], [-100, 2, 3], 2, 9, {"id": "7", "reference": "é"}, None, 1),
                Example([4], [-100], 0, 1, {}, [0], 0)] * 700
    assert write(tmp_path / "x.arrow", examples, "token") == 1400
    split = Split([tmp_path / "x.arrow"], "token")
    for position in (0, 1, 1023, 1024, 1399):
        back, wanted = split[position], examples[position]
        assert list(back.input_ids) == wanted.input_ids and list(back.targets) == wanted.targets
        assert (back.num_targets, back.full_length, back.record, back.source) == (
            wanted.num_targets, wanted.full_length, wanted.record, wanted.source)
    assert split.lengths.sum() == 2800 and split.num_targets.sum() == 1400


def test_the_rows_of_a_spool_are_read_once_whatever_the_parts(tmp_path):
    rows = [Row({"text": "ä" * (number % 7)}, "f", number, str(number)) for number in range(50)]
    path = tmp_path / "train.rows"
    path.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    spool = Spool(path, 50, 0)
    for count in (1, 2, 7, 200):
        assert [row for begin, end in spool.parts(count) for row in spool.read(begin, end)] == rows


plans = st.builds(
    lambda lengths, batch, seed: BatchPlan(np.array(lengths), np.zeros(len(lengths), int), (1.0,), batch, seed),
    st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(1, 20), st.integers(0, 9))


@settings(max_examples=100, deadline=None)
@given(plans, st.integers(1, 5), st.integers(1, 500), st.sampled_from([padded_groups, equal_groups, packed_groups]))
def test_an_epoch_uses_each_example_once_whatever_the_ranks_the_budget_and_the_layout(plan, ranks, budget, grouping):
    for epoch in range(2):
        seen = []
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            dealt = [plan.micro_batches(step, rank=rank, ranks=ranks, budget_tokens=budget, grouping=grouping)
                     for rank in range(ranks)]
            assert len({len(groups) for groups in dealt}) == 1, "every rank runs as many micro-batches"
            seen += [i for groups in dealt for group in groups for i in group]
        assert sorted(seen) == list(range(len(plan.lengths)))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 500))
def test_no_pack_exceeds_its_budget_but_an_example_that_does_so_alone(lengths, budget):
    for group in packed_groups(lengths, budget):
        assert sum(lengths[i] for i in group) <= budget or len(group) == 1
        assert [lengths[i] for i in group] == sorted((lengths[i] for i in group), reverse=True)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 500))
def test_packs_are_never_more_than_twice_what_their_tokens_need(lengths, budget):
    tokens = sum(min(length, budget) for length in lengths)
    assert len(packed_groups(lengths, budget)) <= max(1, 2 * tokens / budget)


def test_a_step_sees_the_same_examples_in_any_order_of_asking():
    plan = BatchPlan(np.ones(50, int), np.zeros(50, int), (1.0,), 8, 1)
    forward = [plan.step(step).tolist() for step in range(20)]
    assert [plan.step(step).tolist() for step in reversed(range(20))] == forward[::-1]
    assert forward[0] != forward[7]


def test_weights_repeat_or_thin_out_a_source():
    source = np.array([0] * 10 + [1] * 10)
    plan = BatchPlan(np.ones(20, int), source, (2.5, 0.3), 7, 0)
    counts = np.bincount(plan.epoch_order(0), minlength=20)
    assert plan.examples_per_epoch == 28 and set(counts[:10]) == {2, 3} and counts[10:].sum() == 3
    assert plan.epoch_order(0).tolist() != plan.epoch_order(1).tolist()


def test_weights_that_leave_no_example_are_refused():
    with pytest.raises(DataError, match="20 examples, times the weights of their sources"):
        BatchPlan(np.ones(20, int), np.zeros(20, int), (0.01,), 8, 0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 5))
def test_evaluation_batches_are_the_same_whatever_the_ranks(lengths, ranks):
    dealt = [batch for rank in range(ranks) for batch in evaluation_batches(lengths, rank=rank, ranks=ranks,
                                                                            budget_tokens=100)]
    assert sorted(dealt) == sorted(evaluation_batches(lengths, rank=0, ranks=1, budget_tokens=100))


def test_a_record_is_parsed_when_it_is_asked_for(tmp_path, monkeypatch):
    write(tmp_path / "a.arrow", [Example([1, 2], [1], 1, 2, {"id": "7", "text": "x"})], "class")
    split = Split([tmp_path / "a.arrow"], "class")
    with monkeypatch.context() as patch:
        patch.setattr(store.json, "loads", lambda text: pytest.fail("a step needs no record"))
        example = split[0]
    assert example.record == {"id": "7", "text": "x"} and dict(example.record) == {**example.record}
