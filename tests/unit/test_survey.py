"""What the survey of the rows finds, what it leaves alone, and that the fast search finds what a slow one does."""

import itertools

import pytest

from peftune.data import survey as survey_module
from peftune.data.rows import Row
from peftune.data.survey import Survey

TWELVE = "the quick brown fox jumps over one lazy dog near my house"
QUESTION = "how many bridges cross the river between the old town and the port"
PASSAGE = "four bridges cross the river " * 20


def look(kind, train=(), validation=(), test=(), **options):
    """Findings by kind, or by kind and split where that is not train."""
    survey = Survey(kind, **options)
    for split, rows in (("train", train), ("validation", validation), ("test", test)):
        for line, fields in enumerate(rows, start=1):
            survey.add(split, Row(fields, f"{split}.jsonl", line, str(line)))
    return {finding.kind if finding.split == "train" else (finding.kind, finding.split): finding
            for finding in survey.findings()}


def lines(finding):
    return [place.line for place in finding.places]


def classed(text, label="a", pair=None):
    return {"text": text, "text_pair": pair, "label": label}


def tagged(*pairs):
    return {"tokens": [pair.split("/")[0] for pair in pairs], "tags": [pair.split("/")[1] for pair in pairs]}


def asked(question, answer="four", context=PASSAGE):
    return {"question": question, "context": context, "answers": [{"text": answer, "start": 0}]}


def prompted(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def preferred(prompt, chosen, rejected):
    return {"messages": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected}


def chat(*texts):
    return {"messages": [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")),
                                                                                 texts)]}


def without(found, *kinds):
    return {kind: finding for kind, finding in found.items() if kind not in kinds}


def rows_apart(count):
    return [classed(f"row{n} says{n} something{n} of{n} its{n} own{n} here{n}") for n in range(count)]


def test_a_row_that_repeats_an_earlier_one_is_found_with_its_line():
    found = look("classification", [*rows_apart(4), classed("good day"), classed("bye"), classed("good day")])
    finding = found.pop("exact_duplicate")
    assert not found and finding.count == 1 and finding.message == "1 row of train repeats an earlier row exactly"
    assert finding.places[0].file == "train.jsonl" and finding.places[0].line == 7
    assert finding.places[0].message == "repeats train.jsonl:5: 'good day'"


@pytest.mark.parametrize("other", ["caf\u0065\u0301 au lait", "  café au\n\tlait ", "café  au lait"])
def test_composition_and_white_space_do_not_tell_two_rows_apart(other):
    assert lines(look("generation", [{"text": "café au lait"}, {"text": other}])["exact_duplicate"]) == [2]


@pytest.mark.parametrize(("one", "other"), [
    (classed("Good day"), classed("good day")), (classed("good day"), classed("good day", "b")),
    (classed("good", pair="day"), classed("day", pair="good")),
])
def test_case_label_and_order_of_a_pair_tell_two_rows_apart(one, other):
    assert "exact_duplicate" not in look("classification", [*rows_apart(4), one, other])


def test_the_same_row_in_two_splits_is_a_leak_and_no_duplicate():
    found = look("classification", rows_apart(4), rows_apart(2))
    assert list(found) == [("leak", "validation")] and found["leak", "validation"].count == 2


@pytest.mark.parametrize(("kind", "row", "again"), [
    ("classification", classed("Good day"), classed("good DAY", "b")),
    ("classification", classed("Good day", pair="sir"), classed("good day", pair="Sir")),
    ("ner", tagged("Good/O", "day/O"), tagged("good/O", "day/B-time")),
    ("squad", asked("Who?"), asked("who?", "five")),
    ("preference", preferred("Who", "I", "you"), preferred("who", "i", "You")),
    ("generation", prompted("Who", "I"), prompted("who", "i")),
    ("generation", {"text": "Good day"}, {"text": "good day"}),
    ("generation", chat("Who", "I"), chat("who", "i")),
])
def test_a_held_out_row_whose_input_is_a_training_row_is_a_leak_whatever_its_case(kind, row, again):
    finding = look(kind, [row], [again])["leak", "validation"]
    assert finding.count == 1 and finding.places[0].message.startswith("is train.jsonl:1 too: ")


@pytest.mark.parametrize(("kind", "row", "other"), [
    ("generation", prompted("Who", "I"), prompted("Who", "you")),
    ("generation", chat("Who", "I"), chat("Who", "you")),
    ("preference", preferred("Who", "I", "you"), preferred("Who", "you", "I")),
    ("squad", asked("Who?"), asked("Who?", context="I did")),
])
def test_a_shared_prompt_or_question_alone_is_no_leak(kind, row, other):
    assert not look(kind, [row], [other])


def test_a_test_row_is_compared_with_validation_too():
    finding = look("generation", [{"text": "a"}], [{"text": "b"}], [{"text": "b"}, {"text": "a"}])["leak", "test"]
    assert lines(finding) == [1, 2] and "validation and train" in finding.message


def test_the_same_text_with_another_label_contradicts_the_first_within_and_across_splits():
    train = [*rows_apart(4), classed(TWELVE), classed(TWELVE.upper(), "b")]
    found = look("classification", train, [classed(TWELVE, "c")])
    assert lines(found["conflicting_label"]) == [6] and lines(found["conflicting_label", "validation"]) == [1]
    assert found["conflicting_label"].places[0].message.startswith("label 'b', but 'a' at train.jsonl:5: 'THE QUICK")
    assert set(without(found, "few_examples")) == {
        "conflicting_label", ("conflicting_label", "validation"), ("leak", "validation")}


def test_labels_in_another_order_do_not_contradict_each_other():
    assert "conflicting_label" not in look("classification", [classed("x", ["a", "b"]), classed("x", ["b", "a"])])


def test_the_same_question_with_another_answer_contradicts_the_first():
    found = look("squad", [asked(QUESTION), asked(f"{QUESTION.upper()} ", "five"), asked(QUESTION, "FOUR")])
    assert lines(found["conflicting_label"]) == [2]
    assert "not its answers" in found["conflicting_label"].message
    assert "other answers than at train.jsonl:1" in found["conflicting_label"].places[0].message


@pytest.mark.parametrize("character", ["\x00", "\x1b", "\ufffd"])
def test_characters_that_a_conversion_has_lost_are_said(character):
    found = look("generation", [prompted("good\n\ttext \u200b", "fine"), prompted("what", f"caf{character} au lait")])
    assert lines(found["lost_characters"]) == [2]
    assert f"U+{ord(character):04X} in 'caf" in found["lost_characters"].places[0].message


def test_the_same_tokens_with_other_tags_contradict_each_other():
    rows = [tagged("Bob/B-person", "left/O"), tagged("Bob/O", "left/O")]
    assert lines(look("ner", rows)["conflicting_label"]) == [2]


@pytest.mark.parametrize("length", [12, 100])
def test_one_changed_word_is_found_in_short_and_long_rows(length):
    words = (TWELVE.split() + [f"w{n}" for n in range(100)])[:length]
    changed = [*words[:5], "Above", *words[6:]]
    finding = look("generation", [{"text": " ".join(words)}, {"text": " ".join(changed)}])["near_duplicate"]
    assert lines(finding) == [2] and "% like train.jsonl:1: 'the quick" in finding.places[0].message


def test_case_and_punctuation_alone_make_a_near_duplicate():
    finding = look("generation", [{"text": TWELVE}, {"text": TWELVE.title() + "!"}])["near_duplicate"]
    assert finding.places[0].message.startswith("100% like")


def test_a_near_duplicate_with_another_label_says_so():
    found = look("classification", [*rows_apart(4), classed(TWELVE), classed(TWELVE + " please", "b")])
    assert " like train.jsonl:5 with label 'a': " in found["near_duplicate"].places[0].message


@pytest.mark.parametrize(("one", "other"), [
    ("cancel my card now", "cancel my card, now"),
    ("How do I receive a card?", "How do I receive a virtual card?"),
    ("How do I go about changing my address?", "How do I go about changing my PIN?"),
])
def test_short_utterances_may_resemble_each_other(one, other):
    assert not look("generation", [{"text": one}, {"text": other}])


def test_a_word_more_is_found_in_eight():
    texts = ["How do I go about cancelling a transaction?", "How do I go about cancelling a transaction please?"]
    assert lines(look("generation", [{"text": text} for text in texts])["near_duplicate"]) == [2]


def test_a_near_copy_in_a_held_out_split_is_a_near_leak():
    found = look("classification", [*rows_apart(4), classed(TWELVE)], [classed(TWELVE.replace("fox", "wolf"))])
    assert list(found) == [("near_leak", "validation")]
    assert "train.jsonl:5" in found["near_leak", "validation"].places[0].message


def test_texts_without_blanks_are_compared_by_character():
    texts = ["我昨天在网上买了一本很有意思的书", "我昨天在网上买了一本很有意思的画"]
    assert "near_duplicate" in look("generation", [{"text": text} for text in texts])


@pytest.mark.parametrize(("kind", "one", "other"), [
    ("squad", asked(QUESTION), asked(QUESTION.replace("many", "few"), "none")),
    ("squad", asked(QUESTION), asked(QUESTION.replace("many", "few"), context=PASSAGE + "now")),
    ("classification", classed(PASSAGE + TWELVE, pair="he sleeps"), classed(PASSAGE + TWELVE, pair="she swims")),
    ("generation", prompted(TWELVE * 9 + " who is the fox", "a red animal"),
     prompted(TWELVE * 9 + " where is the dog", "at home, asleep")),
    ("generation", chat("hello", TWELVE * 9, "thanks"), chat("hello", TWELVE * 9, "thanks", "good bye to you")),
])
def test_what_shares_its_long_part_alone_is_not_near(kind, one, other):
    assert not without(look(kind, [one, other]), "few_examples")


def test_the_same_question_with_the_same_answer_is_near():
    assert "near_duplicate" in look("squad", [asked(QUESTION), asked(QUESTION.replace("cross", "span"))])


def test_a_template_that_many_rows_share_is_not_what_they_say():
    template = "Classify the following review of a film as positive or negative, in a single word: "
    reviews = [f"film{n} was quite{n} good{n} fun{n} to{n} see{n}" for n in range(60)]
    copy = [reviews[7] + " indeed"]
    found = look("generation", [prompted(template + review, "positive") for review in reviews + copy])
    assert lines(found["near_duplicate"]) == [61] and ":8: " in found["near_duplicate"].places[0].message


def test_rare_classes_are_named_with_their_first_rows():
    rows = [classed(f"text {n}", "common") for n in range(200)]
    found = look("classification", [*rows, *(classed(f"odd {n}", "rare") for n in range(3))], [classed("x", "none")])
    assert set(found) == {"imbalance", "few_examples"} and found["imbalance"].count == found["few_examples"].count == 3
    assert lines(found["imbalance"]) == lines(found["few_examples"]) == [201]
    assert "with fewer than 4 rows:" in found["few_examples"].message
    assert found["imbalance"].message.endswith("'rare' has 3") and "1/50" in found["imbalance"].message


def test_four_rows_a_class_and_a_fiftieth_are_enough():
    rows = [classed(f"text {n}", "common") for n in range(200)] + [classed(f"odd {n}", 1.0) for n in range(4)]
    assert not look("classification", rows)


@pytest.mark.parametrize("form", [float, str])
def test_numbers_to_predict_are_no_classes_however_they_are_written(form):
    rows = [classed(text, form(label)) for text, label in (("bad", 0.5), ("fine", 3), ("good", 4.5))]
    assert not look("classification", rows, scores=True)
    assert "few_examples" in look("classification", rows)


@pytest.mark.parametrize("odd", ["pos ", "Pos", "POS", "pos\u00a0"])
def test_a_class_written_in_two_ways_is_said_where_it_is_rarer(odd):
    rows = [classed(f"text {n}", ("pos", "neg")[n % 2]) for n in range(20)] + [classed(f"odd {n}", odd) for n in (1, 2)]
    finding = look("classification", rows)["label_spelling"]
    assert lines(finding) == [21, 22] and finding.count == 2
    assert f"{odd!r} is spelled like 'pos', which has 10 rows" in finding.message


def test_a_number_among_the_names_of_classes_is_said():
    rows = [classed(f"text {n}", ("pos", "neg")[n % 2]) for n in range(20)] + [classed("odd", 1)]
    assert lines(look("classification", rows)["label_spelling"]) == [21]
    assert not look("classification", [classed(f"text {n}", n % 3) for n in range(20)])


def test_one_row_is_said_as_one():
    rows = [classed(f"text {n}", "common") for n in range(20)] + [classed("odd", "rare")]
    assert look("classification", rows)["few_examples"].places[0].message == "'rare' has 1 row; this is the first"


def test_entity_types_are_counted_by_entity():
    enough = tagged("Bob/B-person", "Ann/B-person", "Eva/B-person", "Joe/B-person", "Hill/I-person")
    found = look("ner", [enough, tagged("in/O", "Rome/B-place"), tagged("to/O", "Oslo/B-place")])
    assert list(found) == ["few_examples"] and "'place' has 2" in found["few_examples"].message
    assert found["few_examples"].count == 2 and lines(found["few_examples"]) == [2]


@pytest.mark.parametrize(("pairs", "said"), [
    (("I/O", "saw/O", "Bob/I-person"), "I-person after O at token 3 'Bob'"),
    (("Bob/I-person", "left/O"), "I-person at the start at token 1 'Bob'"),
    (("New/B-place", "Bob/I-person", "Rome/I-place"), "I-person after B-place at token 2 'Bob', and 1 more"),
])
def test_a_continuation_of_nothing_breaks_the_bio_scheme(pairs, said):
    good = tagged("New/B-place", "York/I-place", "and/O", "Bob/B-person")
    finding = look("ner", [good, tagged(*pairs)])["tag_scheme"]
    assert lines(finding) == [2] and finding.places[0].message == said and "BIO scheme" in finding.message


@pytest.mark.parametrize(("pairs", "said"), [
    (("Bob/B-person", "left/O"), "O after B-person at token 2 'left'"),
    (("in/O", "New/B-place", "York/I-place"), "the end after I-place"),
    (("in/O", "York/E-place"), "E-place after O at token 2 'York'"),
    (("New/B-place", "Bob/S-person", "York/S-place"), "S-person after B-place at token 2 'Bob'"),
])
def test_where_any_row_closes_its_entities_all_must(pairs, said):
    good = tagged("Bob/S-person", "in/O", "New/B-place", "York/I-place", "City/E-place")
    finding = look("ner", [tagged(*pairs), good])["tag_scheme"]
    assert lines(finding) == [1] and finding.places[0].message == said and "BIOES" in finding.message


@pytest.mark.parametrize("tags", [["person", "person", "O"], [1, 2, 0], ["B-person", "L-person", "U-person"]])
def test_other_ways_to_write_tags_are_no_faults(tags):
    assert "tag_scheme" not in look("ner", [{"tokens": ["Bob", "Hill", "left"], "tags": tags}])


def test_all_rows_are_counted_and_the_first_ones_shown(monkeypatch):
    monkeypatch.setattr(survey_module, "SHOWN_PLACES", 20)
    finding = look("generation", [{"text": "same"}] * 51)["exact_duplicate"]
    assert finding.count == 50 and lines(finding) == list(range(2, 22))



def test_a_row_of_another_folder_is_named_with_its_folder():
    survey = Survey("generation")
    survey.add("train", Row({"text": "x" * 99}, "a/data.jsonl", 3, "0"))
    survey.add("train", Row({"text": "x" * 99}, "b/data.jsonl", 1, "1"))
    message = survey.findings()[0].places[0].message
    assert message == f"repeats a/data.jsonl:3: '{'x' * 59}…'"


def test_rows_beyond_the_limit_are_said_to_be_left_out_and_held_out_rows_are_still_compared(monkeypatch):
    monkeypatch.setattr(survey_module, "MOST_ROWS", 8)
    monkeypatch.setattr(survey_module, "BATCH_ROWS", 4)
    rows = rows_apart(12)
    copies = [classed(row["text"] + " indeed") for row in rows]
    found = look("classification", [*rows, copies[0]], [copies[1], copies[11]])
    assert found["near_duplicate"].count == 0 and "5 rows of train not at all" in found["near_duplicate"].message
    assert lines(found["near_leak", "validation"]) == [1]
