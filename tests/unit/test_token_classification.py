"""Words to sub-tokens, tags to targets, logits to entities."""

import json

import numpy as np
import pytest
import torch
from seqeval import metrics as seqeval
from seqeval.scheme import IOB2, IOBES
from transformers import AutoTokenizer

from peftune.config.schema import DataConfig, Source
from peftune.data.canonical import CANONICAL
from peftune.data.layouts import lay_out
from peftune.data.rows import Faults, Row
from peftune.data.sources import read
from peftune.data.targets import RowFault, Targets
from peftune.errors import DataError
from peftune.numerics import scores
from peftune.numerics.losses import IGNORE
from peftune.tasks.task import TextEncoder, with_intervals
from peftune.tasks.token_classification import (
    _counts,
    encode,
    encode_prompt,
    learn_targets,
    majority,
    metrics,
    predictions,
)
from tests.conftest import summary

TAGS = Targets("bio", ("O", "B-x", "I-x"))


def row(words, tags):
    return Row({"tokens": words, "tags": tags}, "f", 1, "0")


@pytest.fixture(params=["encoder", "decoder"])
def text(request):
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))
    return TextEncoder(tokenizer, 64, DataConfig(train="x"))


def words_of_targets(example, text):
    """(text of the sub-token, tag) of each target."""
    return [(text.tokenizer.decode([token]).strip(), TAGS.names[int(target)])
            for token, target in zip(example.input_ids, example.targets, strict=True) if target != IGNORE]


def test_the_first_sub_token_of_each_word_is_its_target(text):
    words = ["the", "printerwas", "is", "Çok", "x"]
    (example,) = encode(row(words, ["O", "B-x", "I-x", "O", "B-x"]), TAGS, text)
    found = words_of_targets(example, text)
    assert [tag for _, tag in found] == ["O", "B-x", "I-x", "O", "B-x"] and example.num_targets == 5
    assert len(example.input_ids) > 7, "some words have several sub-tokens"
    firsts = [next(i for i, word in enumerate(example.record["words"]) if word == n) for n in range(5)]
    assert [i for i, target in enumerate(example.targets) if target != IGNORE] == firsts


def test_all_sub_tokens_are_targets_if_asked_and_go_on_inside_the_entity(text):
    every = TextEncoder(text.tokenizer, 64, DataConfig(train="x", subtokens="all"))
    (example,) = encode(row(["printerwas", "is"], ["B-x", "O"]), TAGS, every)
    tags = [TAGS.names[int(target)] for target in example.targets if target != IGNORE]
    assert tags[0] == "B-x" and set(tags[1:-1]) == {"I-x"} and tags[-1] == "O"
    assert example.num_targets == sum(word is not None for word in example.record["words"])


def test_words_beyond_the_limit_are_predicted_as_outside(text):
    short = TextEncoder(text.tokenizer, 8, DataConfig(train="x"))
    words = ["printer"] * 20
    (example,) = encode(row(words, ["B-x"] * 20), TAGS, short)
    assert len(example.input_ids) <= 8 < example.full_length
    if text.tokenizer.sep_token_id is not None:
        assert example.input_ids[-1] == text.tokenizer.sep_token_id
    logits = torch.zeros(1, len(example.input_ids), 3)
    logits[..., 1] = 5
    batch = lay_out([example], [0], pad_id=0, kind="token", width=3, device=torch.device("cpu"))
    (record,) = predictions(logits, batch, TAGS, [example.record])
    kept = example.num_targets
    assert record["prediction"] == ["B-x"] * kept + ["O"] * (20 - kept) and 0 < kept < 8


def test_entities_are_given_as_spans_of_words():
    record = {"tokens": ["Empire", "State", "is", "tall"], "words": [None, 0, 1, 2, 3, None]}
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 0, 1, 0]]), 3).float()
    batch = lay_out([], [], pad_id=0, kind="token", width=3, device=torch.device("cpu"))
    (found,) = predictions(logits, batch, TAGS, [record])
    assert found["prediction"] == ["B-x", "I-x", "O", "B-x"]
    assert found["spans"] == [{"type": "x", "start": 0, "end": 2, "text": "Empire State"},
                              {"type": "x", "start": 3, "end": 4, "text": "tall"}]


@pytest.mark.parametrize(("tags", "problem", "names"), [
    (["B-b", "O", "B-a"], "bio", ("O", "B-a", "I-a", "B-b", "I-b")),
    (["S-a", "O"], "bioes", ("O", "B-a", "I-a", "E-a", "S-a")),
])
def test_the_scheme_and_the_classes_are_found(tags, problem, names):
    targets = learn_targets([row(["w"] * len(tags), tags)], DataConfig(train="x"))
    assert (targets.problem, targets.names) == (problem, names)


@pytest.mark.parametrize("tags", [["O", "O"], ["person", "O"]])
def test_tags_that_make_no_entities_are_refused(tags):
    with pytest.raises(DataError):
        learn_targets([row(["a", "b"], tags)], DataConfig(train="x"))


def test_numbers_count_along_the_labels_of_the_config(text):
    targets = learn_targets([row(["a"], [1])], DataConfig(train="x", labels=("O", "B-x", "I-x")))
    (example,) = encode(row(["a", "b"], [1, 2]), targets, text)
    assert example.record["reference"] == ["B-x", "I-x"]
    with pytest.raises(RowFault, match="3 tags"):
        encode(row(["a"], ["B-y"]), targets, text)


@pytest.mark.parametrize("tag", [-1, -100])
def test_a_number_below_zero_is_no_tag(text, tag):
    with pytest.raises(RowFault, match=rf"ner_tags\[1\] is {tag}: numbers of tags begin at 0"):
        CANONICAL["ner"]({"tokens": ["a", "b"], "ner_tags": [0, tag]})
    with pytest.raises(RowFault, match="3 tags"):
        encode(row(["a"], [tag]), Targets("bio", ("O", "B-x", "I-x")), text)


def random_records(scheme, count=60):
    rng = np.random.default_rng(0)
    tags = ["O", "O", "B-a", "I-a", "B-b", "I-b"] + (["E-a", "S-b"] if scheme is IOBES else [])
    records = []
    for _ in range(count):
        length = int(rng.integers(1, 12))
        want = [str(tag) for tag in rng.choice(tags, length)]
        got = [w if rng.random() < 0.6 else str(rng.choice(tags)) for w in want]
        records.append({"reference": want, "prediction": got, "loss_sum": 1.0, "num_targets": length})
    return records


@pytest.mark.parametrize(("scheme", "problem"), [(IOB2, "bio"), (IOBES, "bioes")])
def test_metrics_are_those_of_seqeval_and_the_sums_behind_the_intervals_give_them_too(scheme, problem):
    records = random_records(scheme)
    want, got = ([record[side] for record in records] for side in ("reference", "prediction"))
    result = with_intervals(metrics(records, Targets(problem, TAGS.names), True))
    for name, score in (("f1", seqeval.f1_score), ("precision", seqeval.precision_score),
                        ("recall", seqeval.recall_score)):
        assert result[name] == pytest.approx(score(want, got), abs=1e-12)
        assert result[f"strict_{name}"] == pytest.approx(score(want, got, mode="strict", scheme=scheme), abs=1e-12)
        low, high = result[f"{name}_interval"]
        assert low < result[name] < high
    assert result["accuracy"] == pytest.approx(seqeval.accuracy_score(want, got))
    report = seqeval.classification_report(want, got, output_dict=True)
    assert result["f1/a"] == pytest.approx(report["a"]["f1-score"]) and "f1/b" in result
    for prefix, used in (("", None), ("strict_", scheme)):
        sums = _counts(want, got, used).sum(axis=0, keepdims=True)
        for name, formula in (("f1", scores.micro_f1), ("precision", scores.precision), ("recall", scores.recall)):
            assert formula(sums)[0] == pytest.approx(result[prefix + name], abs=1e-12)


def test_rows_without_any_entity_score_zero_and_make_no_fault():
    records = [{"reference": ["O"], "prediction": ["O"], "loss_sum": 0.0, "num_targets": 1}]
    result = with_intervals(metrics(records, TAGS, True))
    assert result["f1"] == 0.0 and result["accuracy"] == 1.0


def test_the_counting_guess_is_each_words_commonest_tag():
    train = [{"tokens": ["a", "b"], "reference": ["B-x", "O"]}, {"tokens": ["a"], "reference": ["B-x"]}]
    (guess,) = majority(train, [{"tokens": ["b", "a", "new"], "reference": ["O"] * 3}], TAGS)
    assert guess["prediction"] == ["O", "B-x", "O"]


@pytest.mark.parametrize("fields", [{}, {"tokens": []}, {"tokens": "a b"}, {"tokens": [1]}])
def test_a_record_without_words_cannot_be_predicted(text, fields):
    with pytest.raises(RowFault):
        encode_prompt(fields, text)


def test_a_columns_file_gives_sentences_with_the_line_of_their_first_word(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\nPeter NNP B-NP B-PER\n",
                    encoding="utf-8")
    rows = list(read(Source(path=str(path)), Faults()))
    assert [(found.line, found.values["tokens"], found.values["ner_tags"]) for found in rows] == [
        (3, ["EU", "rejects"], ["B-ORG", "O"]), (7, ["Peter"], ["B-PER"])]


@pytest.mark.parametrize("line", [b"rejects", b"\xff O"])
def test_a_sentence_with_a_word_that_cannot_be_read_is_left_out_whole(line, tmp_path):
    path = tmp_path / "a.conll"
    path.write_bytes(b"EU B-ORG\n" + line + b"\nGerman B-MISC\n\nPeter B-PER\n")
    faults = Faults()
    found = list(read(Source(path=str(path)), faults))
    assert [row.values["tokens"] for row in found] == [["Peter"]]
    assert [fault.line for fault in faults.kept] == [2]


def test_a_small_encoder_learns_to_tag(tag, train):
    settings = {**tag, "train": {"batch_size": 8, "max_steps": 80, "learning_rate": 0.02}}
    folder = train({**settings, "evaluation": {"every_steps": 40}})
    result = summary(folder)
    assert result["metrics"]["validation"]["f1"] > 0.9 > result["baseline"]["validation"]["f1"]
    records = [json.loads(line) for line in (folder / "predictions" / "validation.jsonl").read_text().splitlines()]
    want, got = ([record[side] for record in records] for side in ("reference", "prediction"))
    assert result["metrics"]["validation"]["f1"] == pytest.approx(seqeval.f1_score(want, got), abs=1e-12)


@pytest.mark.parametrize(("line", "word", "tag"), [
    ("10\u00a0000 NUM B-sum", "10\u00a0000", "B-sum"), ("New York\tB-place", "New York", "B-place"),
    ("x\u3000y  O \r", "x\u3000y", "O"), ("EU\tNNP\tB-org\t\r", "EU", "B-org"), (" EU   NNP  B-org", "EU", "B-org"),
])
def test_a_word_of_a_columns_file_keeps_the_blanks_that_part_no_columns(tmp_path, line, word, tag):
    path = tmp_path / "a.conll"
    path.write_text(f"{line}\nends\tO\n\n", encoding="utf-8", newline="")
    faults = Faults()
    [row] = read(Source(path=str(path)), faults)
    assert row.values == {"tokens": [word, "ends"], "ner_tags": [tag, "O"]} and not faults.count
