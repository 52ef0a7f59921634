"""Metrics, against scikit-learn and cases worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from raymask.core.spec import METRICS
from raymask.data.metrics import compute_metrics, constant_prediction, selection_metric

CLASSIFYING = ("accuracy", "f1", "matthews")
CORRELATING = ("pearson", "spearman")


def logits_of(guesses, classes=2):
    """Logits whose largest entry is the guess."""
    return np.eye(classes, dtype=np.float32)[guesses] * 3 - 1


def test_two_classes_are_measured_as_worked_out_by_hand():
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 1])
    guesses = np.array([1, 1, 0, 0, 0, 1, 0, 1])  # 3 true and 1 false positive, 3 true and 1 false negative
    found = compute_metrics(CLASSIFYING, logits_of(guesses), labels)
    assert found == pytest.approx({"accuracy": 6 / 8, "f1": 6 / 8, "matthews": (3 * 3 - 1 * 1) / 16})


def test_f1_of_two_classes_is_that_of_class_one():
    labels, guesses = np.array([1, 0, 0, 0]), np.array([1, 1, 0, 0])
    assert compute_metrics(("f1",), logits_of(guesses), labels)["f1"] == pytest.approx(2 / 3)
    assert compute_metrics(("f1",), logits_of(1 - guesses), 1 - labels)["f1"] == pytest.approx(4 / 5)


def test_f1_of_three_classes_is_their_plain_mean():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    guesses = np.array([0, 0, 0, 1, 1, 1, 0, 2])
    by_class = (2 * 3 / (4 + 4), 2 * 2 / (3 + 2), 2 * 1 / (1 + 2))
    assert compute_metrics(("f1",), logits_of(guesses, 3), labels)["f1"] == pytest.approx(np.mean(by_class))


@given(st.integers(2, 5), st.integers(1, 40), st.integers(0, 10**6))
def test_metrics_on_counts_are_scikit_learn_s(classes, rows, seed):
    """Few rows, so that classes are missing among labels, answers or both."""
    rng = np.random.default_rng(seed)
    some = rng.choice(classes, rng.integers(1, classes + 1), replace=False)
    labels, guesses = rng.choice(some, rows), rng.choice(some, rows)
    average = "binary" if classes == 2 else "macro"
    expected = {
        "accuracy": sk.accuracy_score(labels, guesses),
        "f1": sk.f1_score(labels, guesses, average=average, zero_division=0),
        "matthews": sk.matthews_corrcoef(labels, guesses),
    }
    found = compute_metrics(CLASSIFYING, logits_of(guesses, classes), labels)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert found["accuracy"] == expected["accuracy"]


@pytest.mark.parametrize(("guess", "f1"), [(0, 0.0), (1, 2 / 3)])
def test_constant_guesses_of_a_class_are_measured_without_a_warning(recwarn, guess, f1):
    found = compute_metrics(CLASSIFYING, logits_of([guess] * 4), np.array([0, 1, 0, 1]))
    assert found == pytest.approx({"accuracy": 0.5, "f1": f1, "matthews": 0.0})
    assert not recwarn.list


def test_correlations_are_as_worked_out_by_hand():
    labels = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    guesses = np.array([[1.0], [3.0], [2.0], [9.0]], np.float32)
    # Deviations: labels -1.5 -0.5 0.5 1.5, guesses -2.75 -0.75 -1.75 5.25; ranks 1 3 2 4.
    pearson = 11.5 / np.sqrt(5.0 * 38.75)
    assert compute_metrics(CORRELATING, guesses, labels) == pytest.approx(
        {"pearson": pearson, "spearman": 1 - 6 * 2 / 60}
    )


def test_a_correlation_knows_the_sign():
    labels = np.array([0.0, 1.0, 5.0], np.float32)
    found = compute_metrics(CORRELATING, -labels[:, None], labels)
    assert found == pytest.approx({"pearson": -1.0, "spearman": -1.0})


@pytest.mark.parametrize("constant", ["predictions", "labels"])
def test_a_correlation_that_does_not_exist_counts_as_zero(constant):
    rising, level = np.array([0.5, 1.5, 2.5], np.float32), np.full(3, 0.7, np.float32)
    guesses, labels = (level, rising) if constant == "predictions" else (rising, level)
    assert compute_metrics(CORRELATING, guesses[:, None], labels) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize("names", [("accuracy",), ("f1", "accuracy"), ("spearman",), ("spearman", "pearson")])
def test_only_what_is_asked_for_is_measured_in_that_order(names):
    logits, labels = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4]]), np.array([1, 0, 0])
    assert tuple(compute_metrics(names, logits, labels)) == names


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_that_a_spec_may_name_is_one_for_perfect_predictions(name):
    labels = np.array([0, 1, 1, 0])
    logits = labels[:, None] * 1.0 if name in CORRELATING else logits_of(labels)
    if name == "perplexity":
        logits = np.array([[0.0, 7.0]] * 4)  # each row's seven tokens were certain
    assert compute_metrics((name,), logits, labels) == pytest.approx({name: 1.0})


def test_a_perplexity_is_of_all_tokens_together():
    answers = np.array([[3 * np.log(8), 3], [np.log(2), 1]], np.float32)  # three tokens at 1/8, one at 1/2
    found = compute_metrics(("perplexity",), answers, np.zeros(2))
    assert found == pytest.approx({"perplexity": (8**3 * 2) ** (1 / 4)})
    assert selection_metric(found) == pytest.approx(-np.log(8**3 * 2) / 4)


def test_a_smaller_perplexity_is_better_however_large():
    found = [compute_metrics(("perplexity",), np.array([[cost, 2.0]]), np.zeros(1)) for cost in (0.0, 1.0, 1e6)]
    assert [selection_metric(each) for each in found] == pytest.approx([0.0, -0.5, -700.0])


def test_overall_is_the_plain_mean():
    assert selection_metric({"accuracy": 0.5, "f1": 0.75}) == pytest.approx(0.625)
    assert selection_metric({"matthews": -0.25}) == -0.25


def test_an_answer_is_the_only_one_when_all_rows_have_it():
    same, other = np.array([[0.1, 0.9, 0.2], [0.3, 0.4, 0.1]]), np.array([[0.1, 0.9, 0.2], [0.5, 0.4, 0.1]])
    assert constant_prediction(("a", "b", "c"), same) == "b"
    assert constant_prediction(("a", "b", "c"), other) is None
    assert constant_prediction((), same[:, :1]) is None  # a regression has no answers
