"""Questions to windows, logits to answers."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from peftune.config.schema import DataConfig, EvaluationConfig, Source
from peftune.data.canonical import CANONICAL
from peftune.data.rows import Faults, Row
from peftune.data.sources import read
from peftune.data.targets import RowFault, Targets
from peftune.numerics.losses import IGNORE
from peftune.tasks.question_answering import _best_spans, _windows, combine, encode, learn_targets, metrics
from peftune.tasks.task import TextEncoder, with_intervals
from tests.conftest import metric_rows, summary

CONTEXT = "the printer works again and the badge was lost and the router is fine now and the screen looks great"
SETTINGS = EvaluationConfig(n_best=5, max_answer_tokens=4)


@pytest.fixture(params=["encoder", "decoder"])
def text(request):
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))
    return TextEncoder(tokenizer, 24, DataConfig(train="x", doc_stride=6))


def asked(answer, question="what about it?"):
    answers = [] if answer is None else [{"text": answer, "start": CONTEXT.index(answer)}]
    return Row({"question": question, "context": CONTEXT, "answers": answers}, "f", 1, "q")


def test_windows_cover_the_whole_context_and_mark_the_answer_where_they_hold_all_of_it(text):
    examples = encode(asked("is fine now"), Targets("answer"), text)
    assert len(examples) > 1 and all(len(example.input_ids) <= 24 for example in examples)
    covered = {i for example in examples for offset in example.record["offsets"] if offset for i in range(*offset)}
    assert {i for i, letter in enumerate(CONTEXT) if letter != " "} <= covered
    marked = 0
    for example in examples:
        (first,) = [i for i, mark in enumerate(example.targets) if mark in (1, 3)]
        (last,) = [i for i, mark in enumerate(example.targets) if mark in (2, 3)]
        if first == last == 0:
            continue  # not in this window
        offsets = example.record["offsets"]
        assert CONTEXT[offsets[first][0]:offsets[last][1]].strip() == "is fine now"
        marked += 1
    assert marked >= 1 and all(example.num_targets == 1 for example in examples)


def test_question_and_special_tokens_are_no_candidates_but_for_the_first_token(text):
    for example in encode(asked("is fine now"), Targets("answer"), text):
        for position, (mark, offset) in enumerate(zip(example.targets, example.record["offsets"], strict=True)):
            assert (mark == IGNORE) == (offset is None and position != 0)


def test_an_answer_that_no_window_holds_whole_is_no_target_but_still_asked(text):
    lost = encode(asked(CONTEXT), Targets("answer"), text)
    assert len(lost) > 1
    assert all(example.num_targets == 0 and set(example.targets) <= {IGNORE, 0} for example in lost)


def test_a_question_without_an_answer_marks_the_first_token_of_every_window(text):
    windows = encode(asked(None), Targets("answer_or_none"), text)
    assert len(windows) > 1 and all(example.targets[0] == 3 for example in windows)
    assert learn_targets([asked(None)], None).problem == "answer_or_none"
    assert learn_targets([asked("the badge")], None).problem == "answer"


def test_a_question_that_leaves_no_room_is_a_row_fault(text):
    with pytest.raises(RowFault, match="leaves none for the context"):
        encode(asked("the badge", "what " * 40), Targets("answer"), text)


def test_the_best_spans_are_those_of_trying_all():
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(12, 2)), dtype=torch.float32)
    offsets = [None, None, None, *[(i * 3, i * 3 + 2) for i in range(8)], None]
    every = sorted(((float(logits[i, 0] + logits[j, 1]), offsets[i][0], offsets[j][1])
                    for i in range(3, 11) for j in range(i, min(11, i + 4))), reverse=True)
    found = _best_spans(logits, offsets, SETTINGS)
    assert [(begin, end) for _, begin, end in found] == [(begin, end) for _, begin, end in every[:5]]
    assert [score for score, *_ in found] == pytest.approx([score for score, *_ in every[:5]])


def windows(*spans, null=0.0):
    return [{"id": "q", "context": CONTEXT, "reference": [], "window": number, "spans": several, "null_score": null,
             "loss_sum": 1.0, "num_targets": 1, "position": number, "offsets": []}
            for number, several in enumerate(spans)]


def test_the_best_answer_over_all_windows_wins_and_a_span_seen_twice_counts_once():
    records = windows([[1.0, 0, 3], [0.5, 4, 11]], [[2.0, 4, 11]])
    (question,) = combine(records, Targets("answer"), settings=SETTINGS)
    assert question["prediction"] == CONTEXT[4:11] and question["start"] == 4
    assert [answer["score"] for answer in question["n_best"]] == [2.0, 1.0]
    assert question["loss_sum"] == 2.0 and question["num_targets"] == 2


def test_no_answer_is_given_where_its_score_exceeds_the_best_by_more_than_the_threshold():
    records = windows([[1.0, 0, 3]], null=1.5)
    for threshold, none, problem in ((0.0, True, "answer_or_none"), (0.6, False, "answer_or_none"),
                                     (0.0, False, "answer")):
        settings = EvaluationConfig(no_answer_threshold=threshold)
        (question,) = combine(records, Targets(problem), settings=settings)
        assert (question["prediction"] == "") == none and question["no_answer_margin"] == 0.5


def test_metrics_tell_answerable_questions_from_others():
    records = [{"prediction": "badge", "reference": ["the badge"], "loss_sum": 1.0, "num_targets": 1},
               {"prediction": "", "reference": [], "loss_sum": 1.0, "num_targets": 1},
               {"prediction": "x", "reference": [], "loss_sum": 1.0, "num_targets": 1}]
    result = with_intervals(metrics(records, Targets("answer_or_none"), True))
    assert result["exact_match"] == pytest.approx(2 / 3) and result["unanswerable_accuracy"] == 0.5
    assert result["answerable_f1"] == 1.0 and result["f1_interval"][0] <= result["f1"] <= result["f1_interval"][1]


ANSWER = {"text": "the badge", "answer_start": 28}


@pytest.mark.parametrize("given", [[ANSWER], {"text": ["the badge"], "answer_start": [28]}])
def test_answers_are_read_as_a_list_or_as_the_columns_of_hub_sets(given):
    fields = CANONICAL["squad"]({"question": "q?", "context": CONTEXT, "answers": given})
    assert fields["answers"] == [{"text": "the badge", "start": 28}]


@pytest.mark.parametrize(("answer", "said"), [
    ({"text": "the badge", "answer_start": 3}, "answer_start=28"), ({"text": "a cat", "answer_start": 3}, "mend"),
    ({"text": "the badge"}, "answer_start"), ({"text": "", "answer_start": 0}, "answer_start"), ("x", "answer_start"),
])
def test_an_answer_that_is_not_where_it_is_said_to_be_is_a_row_fault(answer, said):
    with pytest.raises(RowFault) as caught:
        CANONICAL["squad"]({"question": "q?", "context": CONTEXT, "answers": [answer]})
    assert said in caught.value.mend


@pytest.mark.parametrize(("row", "said", "mend"), [
    ({}, "answers is missing", "add answers, []"), ({"answers": None}, "answers is null", "add answers, []"),
    ({"is_impossible": False}, "answers is missing", "add answers, []"),
    ({"answer": [ANSWER]}, "answers is missing", "data.columns={answers: answer}"),
])
def test_a_question_without_answers_is_a_row_fault_and_not_one_that_has_none(row, said, mend):
    with pytest.raises(RowFault) as caught:
        CANONICAL["squad"]({"question": "q?", "context": CONTEXT, **row})
    assert caught.value.message == said and mend in caught.value.mend
    for none in ({"answers": []}, {"is_impossible": True}):
        assert CANONICAL["squad"]({"question": "q?", "context": CONTEXT, **none})["answers"] == []


def test_the_official_nested_file_gives_a_row_a_question(tmp_path):
    path = tmp_path / "dev.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": [
        {"id": "1", "question": "a?", "answers": [ANSWER], "is_impossible": False},
        {"id": "2", "question": "b?", "answers": [], "plausible_answers": [ANSWER], "is_impossible": True}]}]}]}))
    rows = [CANONICAL["squad"](row.values) for row in read(Source(path=str(path)), Faults())]
    assert [len(row["answers"]) for row in rows] == [1, 0] and rows[1]["context"] == CONTEXT


def test_a_small_encoder_learns_its_windows_and_each_question_is_one_prediction(answer, train):
    folder = train({**answer, "train": {"batch_size": 8, "max_steps": 80, "learning_rate": 0.005}, "adapter": None})
    records = [json.loads(line) for line in (folder / "predictions" / "validation.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [f"q{number}" for number in range(40, 49)]
    assert all(record["prediction"] in {"", record["n_best"][0]["text"]} for record in records)
    losses = [row["loss"] for row in metric_rows(folder, "train")]
    assert sum(losses[-8:]) < 0.6 * sum(losses[:8])


@pytest.mark.parametrize(("max_length", "shared"), [(384, 128), (96, 32)])
def test_windows_share_a_third_of_a_short_length_and_128_tokens_of_a_long_one(max_length, shared, encoder):
    text = TextEncoder(AutoTokenizer.from_pretrained(encoder), max_length, DataConfig(train="x", max_length=max_length))
    first, second, *_ = (set(offsets) - {None} for _, _, offsets in _windows("why?", "a b c " * 400, text))
    assert len(first & second) == shared


def test_a_short_length_needs_no_other_setting(answer, train):
    data = {key: value for key, value in answer["data"].items() if key != "doc_stride"}
    folder = train({**answer, "data": {**data, "max_length": 64}}, "train.max_steps=1")
    assert summary(folder)["steps"] == 1
