"""What the survey says of real sets, looked at."""

import itertools
import json

import pytest

from peftune.config.schema import Source
from peftune.data.formats import Found, canonical_rows
from peftune.data.sources import read
from peftune.data.survey import Survey
from tests.conftest import public_data
from tests.unit.test_duplicates import near, shingles_of
from tests.unit.test_survey import lines


def read_split(path, format):
    found = Found()
    return list(canonical_rows(read(Source(path=str(path)), found.faults), format=format, accepts=(format,), columns={},
                               source=0, numbers=itertools.count(), found=found))


def survey_of(kind, format, **files):
    survey = Survey(kind)
    for split, path in files.items():
        for row in read_split(path, format):
            survey.add(split, row)
    return {(finding.kind, finding.split): finding for finding in survey.findings()}


def test_the_planted_faults_of_the_dirty_sets_are_found_at_their_lines_and_nothing_else():
    folder = public_data("dirty")
    intents = survey_of("classification", "classification", train=folder / "classification_train.jsonl",
                        validation=folder / "classification_validation.jsonl")
    dialogues = survey_of("generation", "alpaca", train=folder / "sft_train.jsonl")
    assert {key: lines(finding) for key, finding in intents.items()} == {
        ("conflicting_label", "train"): [44], ("exact_duplicate", "train"): [31], ("near_duplicate", "train"): [181],
        ("leak", "validation"): [26]}
    assert {key: lines(finding) for key, finding in dialogues.items()} == {
        ("exact_duplicate", "train"): [34], ("near_duplicate", "train"): [76]}


@pytest.mark.parametrize(("name", "kind", "format", "kinds"), [
    ("sst2", "classification", "classification", {"exact_duplicate": 9}),
    ("squad", "squad", "squad", {"exact_duplicate": 2, "conflicting_label": 1}),
    ("gsm8k", "generation", "messages", {}),
    ("instructions", "generation", "alpaca", {}),
    ("shakespeare", "generation", "text", {}),
])
def test_public_sets_are_not_accused_of_what_they_do_not_do(name, kind, format, kinds):
    folder = public_data(name)
    found = survey_of(kind, format, train=folder / "train.jsonl", validation=folder / "validation.jsonl")
    assert {finding.kind: finding.count for finding in found.values()} == kinds


def test_what_is_said_of_real_intents_is_true():
    folder = public_data("banking77")
    train, validation = ([json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
                         for split in ("train", "validation"))
    found = survey_of("classification", "classification", train=folder / "train.jsonl",
                      validation=folder / "validation.jsonl")
    texts = {" ".join(row["text"].split()).casefold() for row in train}
    assert found["leak", "validation"].count == sum(
        " ".join(row["text"].split()).casefold() in texts for row in validation)
    assert found["exact_duplicate", "train"].count == len(train) - len(
        {(" ".join(row["text"].split()), row["label"]) for row in train})
    for place in (*found["near_duplicate", "train"].places, *found["near_leak", "validation"].places):
        earlier = int(place.message.split(".jsonl:")[1].split(":")[0].split()[0])
        rows = train if place.file.endswith("train.jsonl") else validation
        assert near(*(shingles_of([row["text"]]) for row in (rows[place.line - 1], train[earlier - 1])))
