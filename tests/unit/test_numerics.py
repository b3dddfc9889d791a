"""Pure functions against naive or library references."""

import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef

from peftune.numerics import scores, squad
from peftune.numerics.counted import counted
from peftune.numerics.dealing import deal, equal_groups, padded_groups, rank_groups
from peftune.numerics.intervals import interval, resampled_positions, resampled_sums
from peftune.numerics.losses import (
    IGNORE,
    class_nats,
    label_nats,
    predicted_tokens,
    preference_nats,
    span_nats,
    squared_error,
    sums_by_sequence,
    token_cross_entropy,
    token_nats,
)
from peftune.numerics.schedules import learning_rate_factor


def next_token_nats(logits, targets, owners, sequences):
    found = predicted_tokens(targets.numpy(), owners.numpy(), logits.shape[1], torch.device("cpu"))
    return sums_by_sequence(token_cross_entropy(logits[found.rows_N, found.columns_N], found.ids_N), found.owners_N,
                            sequences)


lengths = st.lists(st.integers(1, 300), min_size=1, max_size=40)


def rows(count, length):
    """Owners of the tokens of padded rows."""
    return torch.arange(count)[:, None].expand(count, length)


def test_next_token_nats_equal_a_naive_sum_in_float64():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 7, 11, dtype=torch.float64), torch.randint(0, 11, (3, 7))
    targets[0, :5] = IGNORE
    targets[1, 1] = IGNORE
    naive = [sum(-torch.log_softmax(logits[b, t - 1], 0)[targets[b, t]] for t in range(1, 7) if targets[b, t] >= 0)
             for b in range(3)]
    torch.testing.assert_close(next_token_nats(logits, targets, rows(3, 7), 3), torch.stack(naive), rtol=0, atol=1e-12)


def test_an_example_without_targets_has_no_loss_and_a_zero_gradient():
    logits = torch.randn(1, 4, 5, requires_grad=True)
    loss = next_token_nats(logits, torch.full((1, 4), IGNORE), rows(1, 4), 1).sum()
    loss.backward()
    assert loss.item() == 0.0 and not logits.grad.any()
    scores_ = torch.randn(1, 3, requires_grad=True)
    empty = (class_nats(scores_, torch.tensor([IGNORE])), label_nats(scores_, torch.full((1, 3), float("nan"))),
             squared_error(scores_, torch.full((1, 3), float("nan"))))
    sum(part.sum() for part in empty).backward()
    assert not scores_.grad.any()


def test_a_packed_row_never_predicts_a_first_token_from_the_sequence_before_it():
    torch.manual_seed(0)
    logits, targets = torch.randn(1, 7, 11, dtype=torch.float64), torch.randint(0, 11, (1, 7))
    owners = torch.tensor([[0, 0, 0, 1, 2, 2, 2]])
    naive = [sum((-torch.log_softmax(logits[0, t - 1], 0)[targets[0, t]] for t in steps), torch.zeros(()).double())
             for steps in ((1, 2), (), (5, 6))]
    torch.testing.assert_close(next_token_nats(logits, targets, owners, 3), torch.stack(naive), rtol=0, atol=1e-12)


def test_token_nats_equal_a_naive_sum_by_sequence():
    torch.manual_seed(0)
    logits, targets = torch.randn(1, 6, 4, dtype=torch.float64), torch.tensor([[0, IGNORE, 3, 1, 2, IGNORE]])
    owners = torch.tensor([[0, 0, 0, 1, 1, 2]])
    nats = -torch.log_softmax(logits[0], -1)
    naive = torch.stack([nats[0, 0] + nats[2, 3], nats[3, 1] + nats[4, 2], nats.new_zeros(())])
    torch.testing.assert_close(token_nats(logits, targets, owners, 3), naive, rtol=0, atol=1e-12)


def test_span_nats_choose_among_candidates_only():
    torch.manual_seed(0)
    logits = torch.randn(3, 6, 2, dtype=torch.float64)
    marks = torch.tensor([[3, IGNORE, 0, 0, 0, IGNORE],  # no answer: the first token is both ends
                          [0, IGNORE, 0, 1, 2, 0], [0, IGNORE, 0, 0, 0, 0]])
    naive = []
    for row, (first, last) in enumerate(((0, 0), (3, 4))):
        inside = marks[row] != IGNORE
        naive.append(sum(logits[row, inside, side].logsumexp(0) - logits[row, at, side]
                         for side, at in ((0, first), (1, last))) / 2)
    naive.append(torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(span_nats(logits, marks), torch.stack(naive), rtol=0, atol=1e-12)


def test_a_row_that_stands_in_for_none_has_no_span_loss_and_finite_gradients():
    logits = torch.randn(2, 3, 2, requires_grad=True)
    nats = span_nats(logits, torch.tensor([[IGNORE, IGNORE, IGNORE], [3, IGNORE, 0]]))
    nats.sum().backward()
    assert nats[0] == 0 and nats[1] > 0
    assert logits.grad.isfinite().all() and not logits.grad[0].any() and logits.grad[1].any()


def test_preference_nats_are_the_published_formula_in_float64():
    torch.manual_seed(0)
    policy_w, policy_l, reference_w, reference_l = torch.randn(4, 9, dtype=torch.float64) * 30
    beta = 0.3
    ratio = torch.log(torch.exp(policy_w) / torch.exp(reference_w)) - torch.log(
        torch.exp(policy_l) / torch.exp(reference_l))
    naive = -torch.log(1 / (1 + torch.exp(-beta * ratio)))
    given = torch.stack([policy_w, policy_l, reference_w, reference_l], dim=-1)
    torch.testing.assert_close(preference_nats(given, beta), naive, rtol=1e-9, atol=1e-12)


SQUAD_CASES = [  # prediction, answers, exact match, F1: worked out by hand from the official script's rules
    ("The Eiffel Tower.", ["eiffel tower"], 1, 1), ("Denver Broncos", ["Broncos"], 0, 2 / 3),
    ("", [], 1, 1), ("Paris", [], 0, 0), ("", ["Paris"], 0, 0), ("a", ["the", "an apple"], 0, 0),
    ("24", ["24\u201310", "24"], 1, 1), ("gold gold", ["gold"], 0, 2 / 3), ("in the U.S.", ["US"], 0, 2 / 3),
]


@pytest.mark.parametrize(("prediction", "answers", "exact", "f1"), SQUAD_CASES)
def test_squad_scores_follow_the_official_rules(prediction, answers, exact, f1):
    assert squad.best_over(squad.exact_match, prediction, answers) == exact
    assert squad.best_over(squad.f1, prediction, answers) == pytest.approx(f1)


def test_class_label_and_squared_losses_equal_the_textbook():
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.25]], dtype=torch.float64)
    chances = logits.exp() / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(class_nats(logits, torch.tensor([1, 0])),
                               -torch.stack([chances[0, 1], chances[1, 0]]).log(), rtol=0, atol=1e-12)
    wanted = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    naive = [-sum(math.log(p if w else 1 - p) for p, w in zip(torch.sigmoid(row).tolist(), want, strict=True))
             for row, want in zip(logits, wanted.tolist(), strict=True)]
    torch.testing.assert_close(label_nats(logits, wanted), torch.tensor(naive, dtype=torch.float64))
    torch.testing.assert_close(squared_error(logits, wanted), ((logits - wanted) ** 2).sum(1))


@pytest.mark.parametrize(("shape", "theirs"), [
    ("linear", transformers.get_linear_schedule_with_warmup),
    ("cosine", transformers.get_cosine_schedule_with_warmup)])
def test_schedules_equal_those_of_transformers_but_for_the_first_zero_step(shape, theirs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = theirs(optimizer, 10, 100)
    factors = []
    for _ in range(100):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    ours = [learning_rate_factor(shape, step, 100, 0.1) for step in range(100)]
    assert ours[10:] == pytest.approx(factors[10:])
    assert ours[:10] == pytest.approx([factor + 0.1 for factor in factors[:10]])
    assert min(ours) > 0


@pytest.mark.parametrize(("ratio", "steps", "warmup"), [(0.07, 100, 7), (0.14, 50, 7), (0.071, 100, 8), (0.0, 10, 0)])
def test_warmup_is_rounded_up_and_not_by_the_error_of_a_product(ratio, steps, warmup):
    factors = [learning_rate_factor("constant", step, steps, ratio) for step in range(steps)]
    assert sum(factor < 1 for factor in factors) == max(0, warmup - 1)


@given(lengths, st.integers(1, 6))
def test_dealing_gives_each_example_to_one_rank_within_four_thirds_of_the_best(lengths, ranks):
    hands = deal(lengths, ranks)
    assert sorted(i for hand in hands for i in hand) == list(range(len(lengths)))
    bound = max(max(lengths), sum(lengths) / ranks)
    assert max(sum(lengths[i] for i in hand) for hand in hands) <= 4 / 3 * bound + max(lengths)


@given(lengths, st.integers(1, 400))
def test_a_padded_group_fits_the_budget_unless_one_example_alone_does_not(lengths, budget):
    groups = padded_groups(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget


@given(lengths, st.integers(1, 400))
def test_a_group_of_equal_lengths_has_no_padding_and_fits_the_budget(lengths, budget):
    groups = equal_groups(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len({lengths[i] for i in group}) == 1
        assert len(group) == 1 or sum(lengths[i] for i in group) <= budget


@given(lengths, st.integers(1, 6), st.integers(1, 400))
def test_every_rank_has_as_many_micro_batches(lengths, ranks, budget):
    dealt = rank_groups(lengths, ranks, budget)
    assert len({len(groups) for groups in dealt}) == 1
    assert sorted(i for groups in dealt for group in groups for i in group) == list(range(len(lengths)))


def test_scores_of_sums_equal_scikit_learn_on_every_resample():
    rng = np.random.default_rng(0)
    want, got = rng.integers(0, 4, 60), rng.integers(0, 4, 60)
    got[:40] = want[:40]
    one = np.eye(5, dtype=int)  # class 4 never occurs
    features = np.concatenate([one[want] * one[got], one[got], one[want]], axis=1)
    for _ in range(50):
        at = rng.integers(0, 60, 60)
        sums = features[at].sum(0, keepdims=True).astype(float)
        assert scores.macro_f1(sums)[0] == pytest.approx(f1_score(want[at], got[at], average="macro"))
        assert scores.matthews(sums)[0] == pytest.approx(matthews_corrcoef(want[at], got[at]))
        many_want, many_got = one[want[at]] | one[(want[at] + 1) % 4], one[got[at]]
        label = np.concatenate([many_want * many_got, many_got, many_want], axis=1).sum(0, keepdims=True).astype(float)
        for average, ours in (("micro", scores.micro_f1), ("macro", scores.macro_f1_of_all)):
            assert ours(label)[0] == pytest.approx(f1_score(many_want, many_got, average=average, zero_division=0))


def test_pearson_of_sums_equals_numpy():
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    sums = np.column_stack([np.ones(50), x, y, x * y, x * x, y * y]).sum(0, keepdims=True)
    assert scores.pearson(sums)[0] == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one_for_many_examples():
    values = np.random.default_rng(0).normal(5.0, 2.0, 4000)
    low, high = interval(resampled_sums(np.column_stack([values, np.ones(4000)]), scores.ratio))
    half = 1.96 * values.std() / math.sqrt(4000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)
    again = interval(resampled_positions(lambda at: float(values[at].mean()), 4000))
    assert again == pytest.approx((low, high), abs=0.02)


@pytest.mark.parametrize(("count", "unit", "said"), [
    (1, "step", "1 step"), (0, "row", "0 rows"), (2_000, "class", "2,000 classes"),
    (2, "train example", "2 train examples"),
])
def test_one_of_something_is_said_without_an_s(count, unit, said):
    assert counted(count, unit) == said
