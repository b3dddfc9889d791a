"""Labels to targets, logits to records, records to metrics."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from transformers import AutoTokenizer

from peftune.config.schema import DataConfig
from peftune.data.rows import Row
from peftune.data.targets import RowFault, Targets
from peftune.errors import DataError
from peftune.observe.display import Display
from peftune.report.closing import show_metrics
from peftune.tasks import sequence_classification
from peftune.tasks.causal_lm import metrics as text_metrics
from peftune.tasks.generated import Words, generation_scores
from peftune.tasks.sequence_classification import encode, encode_prompt, learn_targets, majority, metrics, predictions
from peftune.tasks.task import TextEncoder, better, with_intervals
from tests.conftest import ROOT


def rows(labels):
    return [Row({"text": "a", "text_pair": None, "label": label}, "f", n, str(n)) for n, label in enumerate(labels)]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "targets", "record"), [
    ("sequence_classification.SEQUENCE_CLASSIFICATION", Targets("single_label", ("a", "b"), "class"),
     {"prediction": "a", "reference": "b"}),
    ("sequence_classification.SEQUENCE_CLASSIFICATION", Targets("regression", (), "class"),
     {"prediction": 0.5, "reference": 1.0}),
    ("token_classification.TOKEN_CLASSIFICATION", Targets("bio", ("O", "B-x", "I-x")),
     {"prediction": ["B-x"], "reference": ["O"]}),
], ids=["classes", "numbers", "entities"])
def test_scoring_loads_no_library_after_a_run_has_planned_its_memory(task, targets, record):
    module, name = task.split(".")
    records = [{**record, "loss_sum": 1.0, "num_targets": 1}] * 3
    code = f"""
import sys
from peftune.data.targets import Targets
from peftune.tasks.{module} import {name} as task
def libraries():
    return {{name.partition(".")[0] for name in sys.modules}}
assert not {{"sklearn", "seqeval"}} & libraries(), "commands that do not score wait for them"
task.import_scoring()
before = libraries()
task.metrics({records!r}, {targets!r}, True)
print(sorted(libraries() - before))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("labels", "problem", "names"), [
    (["b", "a", "b"], "single_label", ("a", "b")),
    ([10, 9, 10], "single_label", ("9", "10")),
    ([1.0, 0.0], "single_label", ("0", "1")),
    ([True, False], "single_label", ("false", "true")),
    ([0.5, 3], "regression", ()),
    ([["x", "y"], [], ["x"]], "multi_label", ("x", "y")),
])
def test_the_kind_of_label_is_found(labels, problem, names):
    targets = learn_targets(rows(labels), DataConfig(train="x"))
    assert (targets.problem, targets.names) == (problem, names)


def test_the_kind_of_label_can_be_set():
    targets = learn_targets(rows([1, 2, 3]), DataConfig(train="x", problem_type="regression"))
    assert targets.problem == "regression" and targets.width == 1


def test_classes_that_are_named_are_no_regression_though_they_are_fractions():
    targets = learn_targets(rows([0.5, 1.5]), DataConfig(train="x", labels=("1.5", "0.5")))
    assert (targets.problem, targets.names) == ("single_label", ("1.5", "0.5"))


@pytest.mark.parametrize(("labels", "problem", "names"), [
    ([4.5, 3.0, 2.5, 1.0], "single_label", ("1", "2.5", "3", "4.5")),
    ([[0.5], [1.5, 2]], "multi_label", ("0.5", "1.5", "2")),
    ([1, 2.5, 3, "bad"], "auto", ("1", "2.5", "3", "bad"))])
def test_no_class_is_lost_where_labels_are_fractions(labels, problem, names):
    assert learn_targets(rows(labels), DataConfig(train="x", problem_type=problem)).names == names


def test_more_labels_than_classes_can_be_are_refused_unless_they_are_values(monkeypatch):
    monkeypatch.setattr(sequence_classification, "MOST_CLASSES", 5)
    with pytest.raises(DataError, match="5 classes or more"):
        learn_targets(rows(["a", "b", "c", "d", "e", "f"]), DataConfig(train="x"))
    assert learn_targets(rows([i + 0.5 for i in range(9)]), DataConfig(train="x")).problem == "regression"


def test_a_single_class_is_no_task():
    with pytest.raises(DataError, match="1 class"):
        learn_targets(rows(["a", "a"]), DataConfig(train="x"))


@pytest.mark.parametrize(("targets", "label"), [
    (Targets("single_label", ("a", "b"), "class"), "c"), (Targets("single_label", ("a", "b"), "class"), ["a"]),
    (Targets("regression", (), "values"), "many"), (Targets("regression", (), "values"), "nan"),
    (Targets("regression", (), "values"), "-inf"), (Targets("regression", (), "values"), 10**400),
    (Targets("multi_label", ("a",), "values"), ["a", "z"]),
])
def test_a_label_outside_the_set_is_a_row_fault(encoder, targets, label):
    text = TextEncoder(AutoTokenizer.from_pretrained(encoder), 32, DataConfig(train="x"))
    with pytest.raises(RowFault) as caught:
        encode(rows([label])[0], targets, text)
    assert caught.value.mend


def test_a_pair_of_texts_is_told_apart_by_segments(encoder):
    text = TextEncoder(AutoTokenizer.from_pretrained(encoder), 32, DataConfig(train="x"))
    row = Row({"text": "the printer", "text_pair": "is broken", "label": "a"}, "f", 1, "0")
    (example,) = encode(row, Targets("single_label", ("a", "b"), "class"), text)
    assert set(example.segment_ids) == {0, 1} and len(example.segment_ids) == len(example.input_ids)


@pytest.mark.parametrize(("record", "said"), [
    ({"text": "x", "text_pair": 5}, "text_pair is 5, not a text"), ({"text": "x", "text_pair": ["y"]}, "text_pair is"),
    ({"Message": "x"}, "the key text is missing"),
])
def test_a_record_that_holds_no_texts_cannot_be_predicted(encoder, record, said):
    text = TextEncoder(AutoTokenizer.from_pretrained(encoder), 32, DataConfig(train="x"))
    with pytest.raises(RowFault, match=said) as caught:
        encode_prompt(record, text)
    assert "text_pair" in record or "data.columns={text: NAME}" in caught.value.mend


def test_single_label_metrics_are_those_of_scikit_learn():
    torch.manual_seed(0)
    targets = Targets("single_label", ("a", "b", "c"), "class")
    logits, want = torch.randn(40, 3), [targets.names[k] for k in np.random.default_rng(0).integers(0, 3, 40)]
    records = [{**record, "reference": w, "loss_sum": 1.0, "num_targets": 1}
               for record, w in zip(predictions(logits, None, targets, []), want, strict=True)]
    got = [record["prediction"] for record in records]
    assert got == [targets.names[k] for k in logits.argmax(1).tolist()]
    result = with_intervals(metrics(records, targets, True))
    assert result["accuracy"] == sk.accuracy_score(want, got)
    assert result["macro_f1"] == pytest.approx(sk.f1_score(want, got, average="macro"))
    assert result["mcc"] == pytest.approx(sk.matthews_corrcoef(want, got))
    for name in ("accuracy", "macro_f1", "mcc"):
        low, high = result[f"{name}_interval"]
        assert low <= result[name] <= high and high - low > 0.05


def test_regression_metrics_are_those_of_scipy_and_undefined_ones_are_none():
    rng = np.random.default_rng(0)
    want, got = rng.normal(size=30), rng.normal(size=30)
    targets = Targets("regression", (), "values")
    records = [{"prediction": g, "reference": w, "loss_sum": 0.0, "num_targets": 1}
               for g, w in zip(got, want, strict=True)]
    result = with_intervals(metrics(records, targets, True))
    assert result["pearson"] == pytest.approx(stats.pearsonr(want, got).statistic, rel=1e-5)
    assert result["spearman"] == pytest.approx(stats.spearmanr(want, got).statistic)
    assert result["rmse"] == pytest.approx(np.sqrt(np.mean((want - got) ** 2)), rel=1e-5)
    constant = [{**record, "prediction": 1.0} for record in records]
    assert metrics(constant, targets, True)["pearson"] is None


def test_multi_label_metrics_count_labels_and_whole_rows():
    targets = Targets("multi_label", ("a", "b"), "values")
    records = [{"prediction": ["a"], "reference": ["a"], "loss_sum": 1, "num_targets": 2},
               {"prediction": ["a", "b"], "reference": ["b"], "loss_sum": 1, "num_targets": 2}]
    result = metrics(records, targets, False)
    assert result["exact_match"] == 0.5 and result["micro_f1"] == pytest.approx(0.8) and result["loss"] == 0.5


def test_the_majority_guess_is_the_commonest_training_class():
    targets = Targets("single_label", ("a", "b"), "class")
    guessed = majority([{"reference": "b"}, {"reference": "b"}, {"reference": "a"}], [{"reference": "a"}], targets)
    assert guessed == [{"reference": "a", "prediction": "b"}]


@pytest.mark.parametrize("text", [
    "The cat sat on the mat, again!", "Кошка сидела на старом коврике 42", "猫坐在垫子上面睡觉",
    "ネコはマットの上で寝る"])
def test_a_perfect_text_of_any_script_scores_full_and_one_that_shares_a_number_alone_does_not(text):
    perfect = {name: value for name, value, _ in generation_scores([text], [text])}
    assert perfect["exact_match"] == perfect["rouge_l"] == 1 and perfect["bleu"] == pytest.approx(100)
    other = {name: value for name, value, _ in generation_scores(["Совсем другое 42"], [text])}
    assert other["rouge_l"] < 0.5 and other["bleu"] < 10


def test_words_of_english_are_those_of_rouge_score():
    from rouge_score.tokenizers import DefaultTokenizer

    text = "It's 3.5 kg of under_scored, mixed-Case words\nand  A1 b2?"
    assert Words().tokenize(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


def test_bleu_of_answers_of_fewer_than_four_words_is_undefined():
    found = {name: (value, resampled()) for name, value, resampled in generation_scores(["yes", "no"], ["yes", "no"])}
    assert math.isnan(found["bleu"][0]) and np.isnan(found["bleu"][1]).all() and found["rouge_l"][0] == 1


def test_text_metrics_score_generations_and_perplexity():
    records = [{"loss_sum": 2.0, "num_targets": 2, "prediction": "the cat", "reference": "the cat"},
               {"loss_sum": 0.0, "num_targets": 2, "prediction": "a dog", "reference": "the dog"},
               {"loss_sum": 2.0, "num_targets": 0, "reference": None}]
    result = with_intervals(text_metrics(records, Targets("next_token"), True))
    assert result["loss"] == 1.0 and result["perplexity"] == pytest.approx(np.e, rel=1e-5)
    assert result["exact_match"] == 0.5 and result["rouge_l"] == pytest.approx(0.75)


def test_rows_that_the_scores_of_generated_text_leave_out_are_counted_and_warned_of(capsys):
    right = {"loss_sum": 2.0, "num_targets": 2, "prediction": "the cat", "reference": "the cat"}
    cut = {"loss_sum": 2.0, "num_targets": 2, "reference": None}
    result = with_intervals(text_metrics([right, cut, cut], Targets("next_token"), True))
    assert result["not_generated"] == 2 and result["exact_match"] == 1.0
    show_metrics(Display(), "test", result)
    assert "2 rows of test have no generated text" in " ".join(capsys.readouterr().out.split())
    for records in ([right], [cut]):
        assert "not_generated" not in text_metrics(records, Targets("next_token"), False)


def test_better_knows_which_way_a_metric_improves_and_never_prefers_an_undefined_value():
    assert better("accuracy", 0.9, 0.8) and not better("accuracy", 0.8, 0.8)
    assert better("loss", 0.1, 0.2) and not better("perplexity", 3.0, 2.0)
    assert not better("loss", None, 0.2) and better("loss", 1.0, None)


def test_classes_are_in_one_order_whatever_comes_first():
    labels = ["1", "nan", "10", "2", "Infinity", "b", "1.5"]  # float() reads two of the words as numbers
    orders = {tuple(sorted(rows, key=sequence_classification._natural)) for rows in itertools.permutations(labels)}
    assert orders == {("1", "1.5", "2", "10", "Infinity", "b", "nan")}
